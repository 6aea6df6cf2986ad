// What torch's own code asks CUDA for: random generators and page-locked memory.
#include "fake.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>

#include "generator.h"

#include <cstring>

namespace fake {
namespace {

// Draws the CPU's numbers.
struct Generator final : c10::GeneratorImpl {
  at::Generator inner;

  Generator(c10::Device device, at::Generator inner)
      : GeneratorImpl(device, c10::DispatchKeySet(c10::DispatchKey::CUDA)), inner(std::move(inner)) {}
  void set_current_seed(uint64_t seed) override {
    inner.set_current_seed(seed);
  }
  void set_offset(uint64_t offset) override {
    inner.set_offset(offset);
  }
  uint64_t get_offset() const override {
    return inner.get_offset();
  }
  uint64_t current_seed() const override {
    return inner.current_seed();
  }
  uint64_t seed() override {
    return inner.seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  GeneratorImpl* clone_impl() const override {
    return new Generator(device_, inner.clone());
  }
};

at::Generator make(c10::Device device) {
  return at::make_generator<Generator>(device, at::detail::createCPUGenerator());
}

at::Generator* default_generators() {
  static at::Generator all[kMaxDevices] = {make({c10::kCUDA, 0}), make({c10::kCUDA, 1})};
  return all;
}

void free_pinned(void* address) {
  driver.cuMemFreeHost(address);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    void* address = nullptr;
    if (nbytes) {
      check(driver.cuMemAllocHost_v2(&address, nbytes), "cuMemAllocHost");
    }
    return {address, address, nbytes ? &free_pinned : &c10::detail::deleteNothing, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &free_pinned;
  }
  void copy_data(void* to, const void* from, size_t nbytes) const override {
    std::memcpy(to, from, nbytes);
  }
};

// No field of its own: see fake_start_hooks.
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return device_count();
  }
  int getNumGPUs() const override {
    return device_count();
  }
  c10::DeviceIndex current_device() const override {
    return fake::current_device();
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return fake::current_device();
  }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    set_current_device(with_index({c10::kCUDA, device}).index());
  }
  c10::Device getDeviceFromPtr(void* data) const override {
    const int device = driver.sim_device_at(reinterpret_cast<uint64_t>(data));
    TORCH_CHECK(device >= 0, "The specified pointer resides on host memory and is not registered with any CUDA device.");
    return {c10::kCUDA, static_cast<c10::DeviceIndex>(device)};
  }
  bool isPinnedPtr(const void* data) const override {
    return is_pinned(data);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    return default_generator(device);
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return make(with_index({c10::kCUDA, device}));
  }
  void deviceSynchronize(c10::DeviceIndex) const override {
    synchronize_device();
  }
};

} // namespace

const at::Generator& default_generator(c10::DeviceIndex device) {
  return default_generators()[with_index({c10::kCUDA, device}).index()];
}

at::Generator generator_on_cpu(const at::Generator& generator) {
  auto* ours = dynamic_cast<Generator*>(generator.unsafeGetGeneratorImpl());
  TORCH_CHECK(
      ours != nullptr, "Expected a 'cuda' device type for generator but found '", generator.device().type(), "'");
  return ours->inner;
}

extern "C" {

// torch makes its hooks once, while it is imported, and keeps them. So the object that is there is made one of ours:
// it gets the virtual functions of Hooks, which has no fields that could be missing.
void fake_start_hooks() {
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  static const Hooks ours;
  const at::CUDAHooksInterface& theirs = at::detail::getCUDAHooks();
  std::memcpy(const_cast<void*>(static_cast<const void*>(&theirs)), static_cast<const void*>(&ours), sizeof(void*));
}

void fake_seed(int device, uint64_t seed) {
  default_generators()[device].set_current_seed(seed);
}

} // extern "C"
} // namespace fake
