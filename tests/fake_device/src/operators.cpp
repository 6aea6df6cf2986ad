// Every operator of torch on the device: the CPU's kernel, after the checks that CUDA makes.
#include "call.h"
#include "generator.h"

#include <ATen/EmptyTensor.h>
#include <ATen/SDPBackend.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/transformers/attention.h>
#include <torch/library.h>

#include <atomic>
#include <set>
#include <string>

namespace fake {

void register_own(torch::Library& library); // copies.cpp
bool is_own(const std::string& name);

namespace {

std::atomic<int64_t> operators{0};

bool starts_with(const std::string& text, const char* start) {
  return text.rfind(start, 0) == 0;
}

// -- the checks

// Operators that take a CPU tensor without dimensions as a number, beside those that are pointwise.
bool takes_numbers(const c10::OperatorHandle& op) {
  if (op.hasTag(at::Tag::pointwise)) {
    return true;
  }
  for (const char* name : {"fill", "masked_fill", "index_fill", "index_put", "_index_put", "lerp", "where", "clamp",
                           "addcmul", "addcdiv", "floor_divide", "_foreach_", "bucketize"}) {
    if (starts_with(op.schema().name(), ("aten::" + std::string(name)).c_str())) {
      return true;
    }
  }
  return false;
}

bool takes_cpu_indices(const c10::OperatorHandle& op, const c10::Argument& argument) {
  const auto& name = op.schema().name();
  return argument.name() == "indices" &&
      (starts_with(name, "aten::index") || starts_with(name, "aten::_index_put") ||
       starts_with(name, "aten::_unsafe_index"));
}

void refuse(
    const c10::OperatorHandle& op, const c10::Argument& argument, c10::Device one, c10::Device other) {
  TORCH_CHECK(
      false, "Expected all tensors to be on the same device, but found at least two devices, ", one, " and ", other,
      "! (when checking argument for argument ", argument.name(), " in method ", op.schema().name(), ")");
}

template <class Look>
void each_tensor(const c10::IValue& value, const Look& look) {
  if (value.isTensor()) {
    look(value.toTensor());
  } else if (value.isList()) {
    for (const c10::IValue& part : value.toListRef()) {
      if (part.isTensor()) {
        look(part.toTensor());
      }
    }
  }
}

// The device of the call's tensors; that of the thread where there are none. Raises where they are not on one device.
c10::Device device_of(const c10::OperatorHandle& op, const c10::IValue* values) {
  const auto& arguments = op.schema().arguments();
  std::optional<c10::Device> device;
  for (size_t i = 0; i < arguments.size(); i++) {
    each_tensor(values[i], [&](const at::Tensor& tensor) {
      if (is_ours(tensor)) {
        if (device && *device != tensor.device()) {
          refuse(op, arguments[i], *device, tensor.device());
        }
        device = tensor.device();
      }
    });
  }
  if (!device) {
    return with_index(c10::kCUDA);
  }
  for (size_t i = 0; i < arguments.size(); i++) {
    each_tensor(values[i], [&](const at::Tensor& tensor) {
      if (!tensor.defined() || is_ours(tensor)) {
        return;
      }
      const bool written = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
      const bool number = tensor.dim() == 0 && !written;
      if (!tensor.device().is_cpu() || !((number && takes_numbers(op)) || takes_cpu_indices(op, arguments[i]))) {
        refuse(op, arguments[i], *device, tensor.device());
      }
    });
  }
  return *device;
}

// -- what the main stream uses

void note_use(const at::Tensor& tensor, Access access) {
  if (is_ours(tensor) && tensor.numel() > 0) {
    const auto nbytes = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize());
    main_uses(tensor.const_data_ptr(), nbytes, access);
  }
}

void note_uses(const c10::OperatorHandle& op, const c10::IValue* values) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); i++) {
    const bool written = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
    each_tensor(values[i], [&](const at::Tensor& tensor) {
      note_use(tensor, written ? Access::kWrite : Access::kRead);
    });
  }
}

// Operators whose result the host waits for.
bool waits(const c10::OperatorHandle& op) {
  const auto& name = op.schema().name();
  return name == "aten::_local_scalar_dense" || name == "aten::equal" || name == "aten::nonzero";
}

// -- the call

template <class Change>
c10::IValue mapped(const c10::IValue& value, const Change& change) {
  if (value.isTensor()) {
    return change(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> tensors;
    for (const at::Tensor& tensor : value.toTensorVector()) {
      tensors.push_back(change(tensor));
    }
    return tensors;
  }
  if (value.isList() && value.toList().elementType()->cast<c10::OptionalType>()) {
    c10::impl::GenericList parts(value.toList().elementType());
    for (const c10::IValue& part : value.toListRef()) {
      parts.push_back(part.isTensor() ? c10::IValue(change(part.toTensor())) : part);
    }
    return parts;
  }
  return value;
}

bool is_generator(const c10::Argument& argument) {
  const auto optional = argument.type()->cast<c10::OptionalType>();
  return optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType;
}

// Replaces the arguments by what the CPU's kernel takes. A factory's argument may name another device.
void to_cpu(const c10::OperatorHandle& op, c10::IValue* values, Call& call, c10::Device& device) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); i++) {
    if (values[i].isDevice() && values[i].toDevice().is_cuda()) {
      device = with_index(values[i].toDevice());
      values[i] = c10::Device(c10::kCPU);
    }
  }
  for (size_t i = 0; i < arguments.size(); i++) {
    if (is_generator(arguments[i])) {
      values[i] = generator_on_cpu(values[i].isNone() ? default_generator(device.index()) : values[i].toGenerator());
    } else {
      values[i] = mapped(values[i], [&](const at::Tensor& tensor) { return call.on_cpu(tensor); });
    }
  }
}

// A view is made on the host: no stream is asked.
bool is_view(const c10::OperatorHandle& op) {
  const auto& returns = op.schema().returns();
  return !returns.empty() && returns[0].alias_info() && !returns[0].alias_info()->isWrite();
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  operators++;
  c10::IValue* values = stack->data() + stack->size() - op.schema().arguments().size();
  c10::Device device = device_of(op, values);
  const Handle stream = current_stream(device.index());
  if (stream && !is_view(op)) {
    // A kernel on a side stream comes after what that stream was given before.
    check(driver.cuStreamSynchronize(stream), op.schema().name().c_str());
  } else if (!is_view(op)) {
    note_uses(op, values);
  }
  Call call;
  {
    c10::InferenceMode off(false);
    at::AutoDispatchBelowADInplaceOrView below;
    to_cpu(op, values, call, device);
    op.callBoxed(stack);
  }
  call.settle(device.index());
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    value = mapped(value, [&](const at::Tensor& tensor) { return call.on_device(tensor, device.index()); });
  }
  if (waits(op)) {
    host_has_seen(position_of(stream));
  }
}

// Compositions of operators that choose their parts by the kind of the device. The CPU's own choice keeps its bits.
const std::set<std::string> kWhole{
    "aten::convolution", "aten::_fused_rms_norm", "aten::grid_sampler_2d", "aten::grid_sampler_3d", "aten::linear",
    "aten::matmul", "aten::scaled_dot_product_attention", "aten::gru.input", "aten::lstm.input",
    "aten::rnn_tanh.input", "aten::rnn_relu.input"};

// Where attention is decomposed, as on tensors without memory, torch asks the device's library for the way to compute it.
int64_t attention_by_parts(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return static_cast<int64_t>(at::SDPBackend::math);
}

} // namespace

// Every operator that has a kernel for CUDA or the CPU gets ours for CUDA; what torch composes of others stays composed.
void register_operators() {
  // On a build with CUDA torch warns that its kernels are replaced.
  struct Silence final : c10::WarningHandler {
    void process(const c10::Warning&) override {}
  };
  static Silence silence;
  c10::WarningUtils::WarningHandlerGuard guard(&silence);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&attention_by_parts);
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    if (!op || !op->hasSchema() || !starts_with(name.name, "aten::")) {
      continue;
    }
    const auto full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    const bool has_kernel = op->hasKernelForDispatchKey(c10::DispatchKey::CUDA) ||
        op->hasKernelForDispatchKey(c10::DispatchKey::CPU);
    if (!is_own(full) && (has_kernel || kWhole.count(full))) {
      library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&run>());
    }
  }
  register_own(library);
}

extern "C" int64_t fake_operators() {
  return operators;
}

} // namespace fake
