// Random generators of the device.
#pragma once

#include <ATen/core/Generator.h>

namespace fake {

const at::Generator& default_generator(c10::DeviceIndex device);
// The generator that draws for a generator of the device. Raises for one of the CPU, as CUDA does.
at::Generator generator_on_cpu(const at::Generator& generator);

} // namespace fake
