// The parts of the fake accelerator, and what they ask of each other.
//
// Tensors of it are torch tensors of type `cuda` whose memory, streams and events are the simulated CUDA driver's.
// Every operator runs the CPU's kernel on the same bytes, after the checks that CUDA makes of its arguments.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <functional>

namespace fake {

constexpr int kMaxDevices = 2;

// -- driver.cpp: the functions of the simulated driver

using Address = unsigned long long;
using Handle = void*; // of a stream or an event; nullptr is the main stream

struct Driver {
  int (*cuMemAllocAsync)(Address*, size_t, Handle);
  int (*cuMemFreeAsync)(Address, Handle);
  int (*cuMemAllocHost_v2)(void**, size_t);
  int (*cuMemFreeHost)(void*);
  int (*cuStreamCreate)(Handle*, unsigned);
  int (*cuStreamQuery)(Handle);
  int (*cuStreamSynchronize)(Handle);
  int (*cuStreamWaitEvent)(Handle, Handle, unsigned);
  int (*cuEventCreate)(Handle*, unsigned);
  int (*cuEventDestroy_v2)(Handle);
  int (*cuEventRecord)(Handle, Handle);
  int (*cuEventQuery)(Handle);
  int (*cuEventSynchronize)(Handle);
  int (*cuLaunchHostFunc)(Handle, void (*)(void*), void*);
  int (*cuCtxSynchronize)();
  int (*cuGetErrorString)(int, const char**);
  void (*sim_use)(int);
  int (*sim_is_device_memory)(uint64_t, size_t);
  int (*sim_is_locked_memory)(uint64_t, size_t);
  int (*sim_device_at)(uint64_t);
};

extern Driver driver;
void load_driver(const char* library);

enum { kSuccess = 0, kOutOfMemory = 2, kNotReady = 600 };

// Raises what torch raises for an error of the driver.
void check(int code, const char* call);

// -- devices.cpp: the current device and streams of a thread

int device_count();
void synchronize_device();
int current_device();
void set_current_device(int device);
Handle current_stream(int device);
inline Handle handle_of(c10::Stream stream) {
  return reinterpret_cast<Handle>(stream.id());
}
// Does work on a stream when the stream comes to it: at once on the main stream.
void enqueue(Handle stream, std::function<void()> work);
// A device without an index is the current one. Raises for one that does not exist.
c10::Device with_index(c10::Device device);

// A thread's current device for the length of a block.
struct OnDevice {
  int before = current_device();
  explicit OnDevice(int device) {
    set_current_device(device);
  }
  ~OnDevice() {
    set_current_device(before);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
};

// -- order.cpp: what the main stream may still be doing

enum class Access { kNone, kRead, kWrite };

// Work given to the main stream uses a range of memory; kNone: whatever used it before does not matter any more.
void main_uses(const void* address, size_t nbytes, Access access);
// Whether work of a side stream on that range could come before the main stream's use of it.
bool overtakes_main(const void* address, size_t nbytes, Access access, Handle stream);
// How far along the main stream a stream is known to be.
int64_t position_of(Handle stream);
void stream_has_seen(Handle stream, int64_t position);
void host_has_seen(int64_t position);
bool host_knows(int64_t position);

// -- memory.cpp: device memory

c10::Allocator* device_allocator();
// Memory that is still in use after its tensors are gone, until a stream has done what it was given so far.
void used_by(void* address, Handle stream);
// Whether a range may be accessed: not freed memory that the allocator keeps, nor what the driver does not know.
bool is_live(const void* address, size_t nbytes);
bool is_pinned(const void* address);
// A copy touched memory that was freed, or was never there.
void note_hazard(const char* what);

} // namespace fake
