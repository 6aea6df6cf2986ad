// The tensors of one operator call as the CPU's kernels see them, and the way back.
#pragma once

#include "fake.h"

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

namespace fake {

inline bool is_ours(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().is_cuda();
}

class Call {
 public:
  // A CPU tensor over the bytes of a tensor of the device; any other tensor as it is.
  at::Tensor on_cpu(const at::Tensor& tensor);
  // What a kernel returned, as a tensor of the device: the argument itself, a view of it, or new memory.
  at::Tensor on_device(const at::Tensor& result, int device);
  // Lets the arguments follow where a kernel resized them.
  void settle(int device);

 private:
  const c10::Storage& storage_of(const at::Tensor& tensor);

  std::vector<std::pair<c10::StorageImpl*, c10::Storage>> storages_; // of the device, the CPU's over the same bytes
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_; // likewise
  std::vector<std::pair<c10::Storage, c10::Storage>> results_; // the CPU's, new ones of the device
};

} // namespace fake
