// Device memory: allocated from the driver, kept for reuse as torch's allocator keeps it, poisoned when it is freed.
#include "fake.h"

#include <c10/util/Exception.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace fake {
namespace {

constexpr size_t kAlignment = 512;
constexpr int kPoison = 0xFF; // NaN in fp8, fp16, bf16 and fp32
// Of each device; what is freed beyond that goes back to the driver.
constexpr int64_t kCacheLimit = int64_t(64) << 20;

struct Block {
  int device;
  int64_t nbytes;
  bool live;
  Handle last_user; // by used_by
};

struct Books {
  int64_t used = 0, peak = 0, cached = 0, reserved_peak = 0, allocations = 0, refused = 0;
  int64_t fails_in = 0; // the allocation that fails, counted from now; 0 for none
  std::unordered_map<int64_t, std::vector<void*>> cache; // bytes: blocks that nobody uses
};

// Never held while the driver is called, which may call back.
std::mutex lock;
std::map<uintptr_t, Block> blocks;
Books books[kMaxDevices];
std::vector<std::string> hazards;

[[noreturn]] void out_of_memory(int device, int64_t nbytes, const char* why) {
  int64_t used;
  {
    std::lock_guard<std::mutex> hold(lock);
    books[device].refused++;
    used = books[device].used;
  }
  TORCH_CHECK_WITH(
      OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", nbytes, " bytes on the fake device ", device,
      ", where ", used, " bytes are in use", why, ".");
}

void* take_cached(int device, int64_t nbytes) {
  auto found = books[device].cache.find(nbytes);
  if (found == books[device].cache.end() || found->second.empty()) {
    return nullptr;
  }
  void* address = found->second.back();
  found->second.pop_back();
  books[device].cached -= nbytes;
  return address;
}

void* from_driver(int device, int64_t nbytes) {
  OnDevice on(device);
  Address address = 0;
  int code = driver.cuMemAllocAsync(&address, nbytes, nullptr);
  if (code == kOutOfMemory) {
    return nullptr;
  }
  check(code, "cuMemAllocAsync");
  return reinterpret_cast<void*>(address);
}

void to_driver(int device, void* address) {
  OnDevice on(device);
  int64_t nbytes;
  {
    std::lock_guard<std::mutex> hold(lock);
    nbytes = blocks.at(reinterpret_cast<uintptr_t>(address)).nbytes;
    blocks.erase(reinterpret_cast<uintptr_t>(address));
  }
  main_uses(address, nbytes, Access::kNone);
  driver.cuMemFreeAsync(reinterpret_cast<Address>(address), nullptr);
}

// Gives the blocks that nobody uses back to the driver.
void drop_cached(int device) {
  std::vector<void*> dropped;
  {
    std::lock_guard<std::mutex> hold(lock);
    for (auto& [nbytes, addresses] : books[device].cache) {
      dropped.insert(dropped.end(), addresses.begin(), addresses.end());
    }
    books[device].cache.clear();
    books[device].cached = 0;
  }
  for (void* address : dropped) {
    to_driver(device, address);
  }
}

void* allocate(int device, size_t wanted) {
  const int64_t nbytes = (wanted + kAlignment - 1) / kAlignment * kAlignment;
  auto& own = books[device];
  void* address;
  bool fails;
  {
    std::lock_guard<std::mutex> hold(lock);
    own.allocations++;
    fails = own.fails_in > 0 && --own.fails_in == 0;
    address = fails ? nullptr : take_cached(device, nbytes);
  }
  if (fails) {
    out_of_memory(device, nbytes, " (as a test asked for)");
  }
  if (!address) {
    address = from_driver(device, nbytes);
  }
  if (!address) {
    drop_cached(device);
    address = from_driver(device, nbytes);
  }
  if (!address) {
    out_of_memory(device, nbytes, "");
  }
  // Of the main stream's pool: kernels that it was given may still use what lay here before.
  main_uses(address, nbytes, current_stream(device) ? Access::kNone : Access::kWrite);
  std::lock_guard<std::mutex> hold(lock);
  blocks[reinterpret_cast<uintptr_t>(address)] = {device, nbytes, true, nullptr};
  own.used += nbytes;
  own.peak = std::max(own.peak, own.used);
  own.reserved_peak = std::max(own.reserved_peak, own.used + own.cached);
  return address;
}

void free_now(void* address) {
  Block block;
  {
    std::lock_guard<std::mutex> hold(lock);
    block = blocks.at(reinterpret_cast<uintptr_t>(address));
  }
  std::memset(address, kPoison, block.nbytes);
  {
    std::lock_guard<std::mutex> hold(lock);
    auto& own = books[block.device];
    own.used -= block.nbytes;
    blocks.at(reinterpret_cast<uintptr_t>(address)).live = false;
    if (own.cached + block.nbytes <= kCacheLimit) {
      own.cached += block.nbytes;
      own.cache[block.nbytes].push_back(address);
      return;
    }
  }
  to_driver(block.device, address);
}

void free_block(void* address) {
  Handle user = nullptr;
  {
    std::lock_guard<std::mutex> hold(lock);
    user = blocks.at(reinterpret_cast<uintptr_t>(address)).last_user;
  }
  if (user) {
    enqueue(user, [address] { free_now(address); });
  } else {
    free_now(address);
  }
}

// The block that an address lies in, live or not; the lock is held.
std::pair<const uintptr_t, Block>* block_of(const void* address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  auto after = blocks.upper_bound(at);
  if (after == blocks.begin()) {
    return nullptr;
  }
  --after;
  return at < after->first + after->second.nbytes ? &*after : nullptr;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    const int device = current_device();
    void* address = nbytes ? fake::allocate(device, nbytes) : nullptr;
    return {address, address, nbytes ? &free_block : &c10::detail::deleteNothing, c10::Device(c10::kCUDA, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &free_block;
  }
  void copy_data(void* to, const void* from, size_t nbytes) const override {
    std::memcpy(to, from, nbytes);
  }
};

DeviceAllocator device_memory;

} // namespace

c10::Allocator* device_allocator() {
  return &device_memory;
}

void used_by(void* address, Handle stream) {
  std::lock_guard<std::mutex> hold(lock);
  if (auto* block = block_of(address)) {
    block->second.last_user = stream;
  }
}

bool is_live(const void* address, size_t nbytes) {
  {
    std::lock_guard<std::mutex> hold(lock);
    if (const auto* block = block_of(address)) {
      const auto end = reinterpret_cast<uintptr_t>(address) + nbytes;
      return block->second.live && end <= block->first + block->second.nbytes;
    }
  }
  return driver.sim_is_device_memory(reinterpret_cast<uint64_t>(address), nbytes);
}

bool is_pinned(const void* address) {
  return driver.sim_is_locked_memory(reinterpret_cast<uint64_t>(address), 1);
}

void note_hazard(const char* what) {
  std::lock_guard<std::mutex> hold(lock);
  hazards.emplace_back(what);
}

extern "C" {

void fake_start_memory() {
  const uint8_t highest = 255;
  c10::SetAllocator(c10::kCUDA, &device_memory, highest);
}

int64_t fake_memory(int device, const char* what) {
  std::lock_guard<std::mutex> hold(lock);
  const auto& own = books[device];
  const std::map<std::string, int64_t> figures{
      {"used", own.used},
      {"peak", own.peak},
      {"reserved", own.used + own.cached},
      {"reserved_peak", own.reserved_peak},
      {"allocations", own.allocations},
      {"refused", own.refused},
  };
  return figures.at(what);
}

void fake_reset_peak(int device) {
  std::lock_guard<std::mutex> hold(lock);
  books[device].peak = books[device].used;
  books[device].reserved_peak = books[device].used + books[device].cached;
}

void fake_fail_at(int device, int64_t allocation) {
  std::lock_guard<std::mutex> hold(lock);
  books[device].fails_in = allocation;
}

void fake_drop_cached(int device) {
  drop_cached(device);
}

int64_t fake_hazards() {
  std::lock_guard<std::mutex> hold(lock);
  return hazards.size();
}

// The oldest hazard, which is then forgotten.
const char* fake_pop_hazard() {
  static thread_local std::string first;
  std::lock_guard<std::mutex> hold(lock);
  first = hazards.empty() ? "" : hazards.front();
  if (!hazards.empty()) {
    hazards.erase(hazards.begin());
  }
  return first.c_str();
}

} // extern "C"
} // namespace fake
