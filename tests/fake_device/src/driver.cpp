// The simulated driver's functions, looked up in its library.
#include "fake.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <dlfcn.h>

namespace fake {

Driver driver;

namespace {

template <class Function>
void look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  TORCH_CHECK(function != nullptr, "the simulated driver has no ", name);
}

} // namespace

void load_driver(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  TORCH_CHECK(library != nullptr, dlerror());
#define LOOK_UP(name) look_up(library, #name, driver.name)
  LOOK_UP(cuMemAllocAsync);
  LOOK_UP(cuMemFreeAsync);
  LOOK_UP(cuMemAllocHost_v2);
  LOOK_UP(cuMemFreeHost);
  LOOK_UP(cuStreamCreate);
  LOOK_UP(cuStreamQuery);
  LOOK_UP(cuStreamSynchronize);
  LOOK_UP(cuStreamWaitEvent);
  LOOK_UP(cuEventCreate);
  LOOK_UP(cuEventDestroy_v2);
  LOOK_UP(cuEventRecord);
  LOOK_UP(cuEventQuery);
  LOOK_UP(cuEventSynchronize);
  LOOK_UP(cuLaunchHostFunc);
  LOOK_UP(cuCtxSynchronize);
  LOOK_UP(cuGetErrorString);
  LOOK_UP(sim_use);
  LOOK_UP(sim_is_device_memory);
  LOOK_UP(sim_is_locked_memory);
  LOOK_UP(sim_device_at);
#undef LOOK_UP
}

void check(int code, const char* call) {
  if (code == kSuccess) {
    return;
  }
  const char* text = "unknown error";
  driver.cuGetErrorString(code, &text);
  throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, code, c10::str("CUDA error: ", text, " (", call, ")"));
}

} // namespace fake
