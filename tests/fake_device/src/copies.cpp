// The operators that make tensors of the device, move bytes to and from it, and put storages under tensors.
#include "call.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <cstring>
#include <set>
#include <string>

namespace fake {
namespace {

// -- new tensors

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  OnDevice on(with_index(device.value_or(c10::kCUDA)).index());
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), device_allocator(), c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  OnDevice on(with_index(device.value_or(c10::kCUDA)).index());
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), device_allocator(),
      c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

// -- copies

// Bytes that stay as they are go in this thread, as a driver's copy costs the host nothing. Torch's own would wait for
// other threads, for milliseconds on a busy machine.
void move(const at::Tensor& to, const at::Tensor& from) {
  if (to.scalar_type() == from.scalar_type() && to.sizes() == from.sizes() && to.is_contiguous() &&
      from.is_contiguous() && to.is_conj() == from.is_conj() && to.is_neg() == from.is_neg()) {
    std::memmove(to.mutable_data_ptr(), from.const_data_ptr(), to.nbytes());
  } else {
    to.copy_(from);
  }
}

// What a copy knows of a tensor once it is enqueued: an address, which keeps nothing alive.
struct Bytes {
  void* data;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
  size_t nbytes;
  bool on_device, conj, neg;

  explicit Bytes(const at::Tensor& tensor)
      : data(const_cast<void*>(tensor.const_data_ptr())),
        sizes(tensor.sizes().vec()),
        strides(tensor.strides().vec()),
        dtype(tensor.scalar_type()),
        nbytes(at::detail::computeStorageNbytes(sizes, strides, tensor.itemsize())),
        on_device(is_ours(tensor)),
        conj(tensor.is_conj()),
        neg(tensor.is_neg()) {}

  bool are_there() const {
    return on_device ? is_live(data, nbytes) : is_pinned(data);
  }
  at::Tensor on_cpu() const {
    auto tensor = at::from_blob(data, sizes, strides, at::TensorOptions(dtype));
    tensor._set_conj(conj);
    tensor._set_neg(neg);
    return tensor;
  }
};

void check_order(const Bytes& bytes, Access access, Handle stream) {
  if (!bytes.on_device) {
    return;
  }
  if (!stream) {
    main_uses(bytes.data, bytes.nbytes, access);
  } else if (overtakes_main(bytes.data, bytes.nbytes, access, stream)) {
    note_hazard("a copy on a side stream overtakes the main stream's use of its memory");
  }
}

void copy_later(const at::Tensor& target, const at::Tensor& source, Handle stream) {
  const Bytes to(target), from(source);
  check_order(to, Access::kWrite, stream);
  check_order(from, Access::kRead, stream);
  // The driver reads pageable memory before it returns.
  at::Tensor staged;
  if (!from.on_device && !is_pinned(from.data)) {
    staged = source.clone();
  }
  enqueue(stream, [to, from, staged] {
    if (!to.are_there() || !(staged.defined() || from.are_there())) {
      note_hazard("a copy on a side stream came when its memory was already freed");
      return;
    }
    c10::InferenceMode off(false);
    at::AutoDispatchBelowADInplaceOrView below;
    move(to.on_cpu(), staged.defined() ? staged : from.on_cpu());
  });
}

void copy_now(const at::Tensor& target, const at::Tensor& source) {
  c10::InferenceMode off(false);
  at::AutoDispatchBelowADInplaceOrView below;
  Call call;
  move(call.on_cpu(target), call.on_cpu(source));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  TORCH_CHECK(!source.is_meta() && !self.is_meta(), "Cannot copy out of meta tensor; no data!");
  const bool on_device = is_ours(self) && is_ours(source);
  const Handle stream = current_stream((is_ours(self) ? self : source).device().index());
  const bool to_pageable = !is_ours(self) && !is_pinned(self.const_data_ptr());
  if (stream && (non_blocking || on_device) && !to_pageable && self.numel() > 0) {
    c10::InferenceMode off(false);
    at::AutoDispatchBelowADInplaceOrView below;
    copy_later(self, source.expand(self.sizes()), stream);
    return self;
  }
  check_order(Bytes(self), Access::kWrite, stream);
  check_order(Bytes(source), Access::kRead, stream);
  if (stream) {
    check(driver.cuStreamSynchronize(stream), "cudaMemcpyAsync");
  }
  copy_now(self, source);
  if (!non_blocking && !on_device) {
    host_has_seen(position_of(stream));
  }
  return self;
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  used_by(const_cast<void*>(self.storage().data()), handle_of(stream));
}

// -- storages

at::Tensor& set_storage(
    at::Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  TORCH_CHECK(
      source.device().is_cuda(), "Attempted to set the storage of a tensor on device \"", self.device(),
      "\" to a storage on different device \"", source.device(), "\".");
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(sizes[i], 1)) {
    strides[i] = stride.size() == size.size() ? stride[i].expect_int() : step;
  }
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(sizes, strides, offset.expect_int());
  return self;
}

at::Tensor& set_whole(at::Tensor& self, c10::Storage source) {
  const c10::SymInt count(static_cast<int64_t>(source.nbytes() / self.dtype().itemsize()));
  return set_storage(self, std::move(source), 0, {&count, 1}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  OnDevice on(self.device().index());
  return set_whole(
      self,
      c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), 0, device_allocator()->allocate(0), device_allocator(), true));
}

} // namespace

bool is_own(const std::string& name) {
  static const std::set<std::string> names{
      "aten::empty.memory_format", "aten::empty_strided", "aten::copy_", "aten::record_stream",
      "aten::set_.source_Storage_storage_offset", "aten::set_.source_Storage", "aten::set_.source_Tensor",
      "aten::set_"};
  return names.count(name);
}

void register_own(torch::Library& library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("copy_", &copy_);
  library.impl("record_stream", &record_stream);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", &set_whole);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("set_", &set_nothing);
}

} // namespace fake
