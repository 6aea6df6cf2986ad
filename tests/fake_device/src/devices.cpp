// Devices, streams and events, as torch asks for them: through a device guard.
#include "fake.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace fake {
namespace {

int devices = kMaxDevices;
thread_local int device_of_thread = 0;
// An event of the driver, and how far along the main stream the stream was when it was recorded.
struct Event {
  Handle handle = nullptr;
  int64_t position = 0;
  bool of_main = false;
};

thread_local Handle streams_of_thread[kMaxDevices] = {};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return c10::kCUDA;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override {
    return with_index(c10::kCUDA);
  }
  void setDevice(c10::Device device) const override {
    set_current_device(with_index(device).index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) {
      set_current_device(device.index());
    }
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return devices;
  }

  // -- streams

  static c10::Stream stream(c10::Device device, Handle handle) {
    return c10::Stream(c10::Stream::UNSAFE, device, reinterpret_cast<c10::StreamId>(handle));
  }
  c10::Stream getStream(c10::Device device) const override {
    return stream(with_index(device), current_stream(with_index(device).index()));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream(with_index(device), nullptr);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    Handle handle;
    check(driver.cuStreamCreate(&handle, 0), "cuStreamCreate");
    return stream(with_index(device), handle);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream to) const override {
    const auto before = getStream(to.device());
    streams_of_thread[to.device_index()] = handle_of(to);
    return before;
  }
  bool queryStream(const c10::Stream& stream) const override {
    return is_done(driver.cuStreamQuery(handle_of(stream)), "cuStreamQuery");
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    const auto position = position_of(handle_of(stream));
    check(driver.cuStreamSynchronize(handle_of(stream)), "cuStreamSynchronize");
    host_has_seen(position);
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    synchronize_device();
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    used_by(data.get(), handle_of(stream));
  }

  // -- events

  void record(void** made, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*made) {
      auto* event = new Event();
      *made = event;
      check(driver.cuEventCreate(&event->handle, 0), "cuEventCreate");
    }
    auto* event = static_cast<Event*>(*made);
    check(driver.cuEventRecord(event->handle, handle_of(stream)), "cuEventRecord");
    event->position = position_of(handle_of(stream));
    event->of_main = !handle_of(stream);
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event) {
      check(driver.cuStreamWaitEvent(handle_of(stream), handle(event), 0), "cuStreamWaitEvent");
      stream_has_seen(handle_of(stream), static_cast<Event*>(event)->position);
    }
  }
  // The main stream's kernels are done at once here. Whoever takes that for known would never be seen to overtake them,
  // so an event of the main stream is done once the host has waited for it, or for a later one.
  bool queryEvent(void* event) const override {
    if (!event) {
      return true;
    }
    const auto* recorded = static_cast<Event*>(event);
    if (recorded->of_main) {
      return host_knows(recorded->position);
    }
    const bool done = is_done(driver.cuEventQuery(recorded->handle), "cuEventQuery");
    if (done) {
      host_has_seen(recorded->position);
    }
    return done;
  }
  void synchronizeEvent(void* event) const override {
    if (event) {
      check(driver.cuEventSynchronize(handle(event)), "cuEventSynchronize");
      host_has_seen(static_cast<Event*>(event)->position);
    }
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    if (event) {
      driver.cuEventDestroy_v2(handle(event));
      delete static_cast<Event*>(event);
    }
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override {
    return 0;
  }

  static Handle handle(void* event) {
    return static_cast<Event*>(event)->handle;
  }

  static bool is_done(int code, const char* call) {
    if (code != kNotReady) {
      check(code, call);
    }
    return code == kSuccess;
  }
};

void run_and_delete(void* work) {
  auto* function = static_cast<std::function<void()>*>(work);
  (*function)();
  delete function;
}

} // namespace

void synchronize_device() {
  const auto position = position_of(nullptr);
  check(driver.cuCtxSynchronize(), "cuCtxSynchronize");
  host_has_seen(position);
}

int device_count() {
  return devices;
}

int current_device() {
  return device_of_thread;
}

void set_current_device(int device) {
  device_of_thread = device;
  driver.sim_use(device);
}

Handle current_stream(int device) {
  return streams_of_thread[device];
}

c10::Device with_index(c10::Device device) {
  if (!device.has_index()) {
    return {c10::kCUDA, static_cast<c10::DeviceIndex>(device_of_thread)};
  }
  TORCH_CHECK(device.index() < devices, "CUDA error: invalid device ordinal");
  return device;
}

void enqueue(Handle stream, std::function<void()> work) {
  auto* kept = new std::function<void()>(std::move(work));
  check(driver.cuLaunchHostFunc(stream, &run_and_delete, kept), "cuLaunchHostFunc");
}

extern "C" void fake_start_devices(int count) {
  devices = count;
  static Guard guard;
  c10::impl::DeviceGuardImplRegistrar registered(c10::kCUDA, &guard);
}

extern "C" int64_t fake_stream(int device) {
  return reinterpret_cast<int64_t>(streams_of_thread[device]);
}

extern "C" void fake_set_stream(int device, int64_t stream) {
  streams_of_thread[device] = reinterpret_cast<Handle>(stream);
}

} // namespace fake
