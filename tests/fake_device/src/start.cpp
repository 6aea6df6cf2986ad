// Puts the device in CUDA's place, in the process that loads this.
#include "fake.h"

#include <ATen/Context.h>

#include <exception>
#include <string>

namespace fake {

void register_operators();

extern "C" {

void fake_start_memory();
void fake_start_devices(int count);
void fake_start_hooks();

// nullptr, or what went wrong.
const char* fake_start(const char* driver_library, int devices) {
  static std::string error;
  try {
    load_driver(driver_library);
    fake_start_memory();
    fake_start_devices(devices);
    fake_start_hooks();
    register_operators();
    at::globalContext().lazyInitDevice(c10::kCUDA);
  } catch (const std::exception& raised) {
    error = raised.what();
    return error.c_str();
  }
  return nullptr;
}

int fake_current_device() {
  return current_device();
}

void fake_set_device(int device) {
  set_current_device(device);
}

} // extern "C"
} // namespace fake
