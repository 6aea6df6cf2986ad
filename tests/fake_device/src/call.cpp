#include "call.h"

#include <cstring>

namespace fake {
namespace {

at::Tensor make(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) {
    impl->set_wrapped_number(true);
  }
  return made;
}

// The bytes of the CPU's memory in new memory of the device.
c10::DataPtr on_device(const c10::StorageImpl* theirs, int device) {
  OnDevice on(device);
  auto data = device_allocator()->allocate(theirs->nbytes());
  if (theirs->nbytes()) {
    std::memcpy(data.get(), theirs->data(), theirs->nbytes());
  }
  return data;
}

} // namespace

const c10::Storage& Call::storage_of(const at::Tensor& tensor) {
  auto* ours = tensor.storage().unsafeGetStorageImpl();
  for (const auto& [known, theirs] : storages_) {
    if (known == ours) {
      return theirs;
    }
  }
  storages_.emplace_back(
      ours,
      c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(),
          ours->nbytes(),
          c10::DataPtr(const_cast<void*>(ours->data()), c10::Device(c10::kCPU)),
          c10::GetAllocator(c10::kCPU),
          /*resizable=*/true));
  return storages_.back().second;
}

at::Tensor Call::on_cpu(const at::Tensor& tensor) {
  if (!is_ours(tensor)) {
    return tensor;
  }
  for (const auto& [ours, theirs] : tensors_) {
    if (ours.is_same(tensor)) {
      return theirs;
    }
  }
  auto theirs = make(storage_of(tensor), c10::DispatchKey::CPU, tensor);
  theirs._set_conj(tensor.is_conj());
  theirs._set_neg(tensor.is_neg());
  tensors_.emplace_back(tensor, theirs);
  return theirs;
}

at::Tensor Call::on_device(const at::Tensor& result, int device) {
  if (!result.defined() || !result.device().is_cpu()) {
    return result;
  }
  for (const auto& [ours, theirs] : tensors_) {
    if (theirs.is_same(result)) {
      return ours;
    }
  }
  for (const auto& [ours, theirs] : tensors_) {
    if (theirs.storage().is_alias_of(result.storage())) {
      // An inference tensor where the argument is one, whatever mode is on: as views are.
      auto view = at::detail::make_tensor<c10::TensorImpl>(
          c10::TensorImpl::VIEW, c10::Storage(ours.storage()), ours.key_set(), result.dtype());
      view.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
      return view;
    }
  }
  auto* theirs = result.storage().unsafeGetStorageImpl();
  for (const auto& [known, ours] : results_) {
    if (known.unsafeGetStorageImpl() == theirs) {
      return make(ours, c10::DispatchKey::CUDA, result);
    }
  }
  c10::Storage ours = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), theirs->nbytes(), fake::on_device(theirs, device), device_allocator(),
      /*resizable=*/true);
  results_.emplace_back(result.storage(), ours);
  return make(ours, c10::DispatchKey::CUDA, result);
}

void Call::settle(int device) {
  for (auto& [ours, theirs] : storages_) {
    if (theirs.data() != ours->data() || theirs.nbytes() != ours->nbytes()) {
      const auto nbytes = theirs.nbytes();
      ours->set_data_ptr_noswap(fake::on_device(theirs.unsafeGetStorageImpl(), device));
      ours->set_nbytes(nbytes);
    }
  }
  for (auto& [ours, theirs] : tensors_) {
    if (ours.sizes() != theirs.sizes() || ours.strides() != theirs.strides() ||
        ours.storage_offset() != theirs.storage_offset()) {
      ours.unsafeGetTensorImpl()->set_sizes_and_strides(theirs.sizes(), theirs.strides(), theirs.storage_offset());
    }
  }
}

} // namespace fake
