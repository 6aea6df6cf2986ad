// What the main stream may still be doing, as seen from the side streams. The main stream's kernels are done at once here,
// so that a side stream overtakes them cannot show in values: it is watched for.
#include "fake.h"

#include <algorithm>
#include <map>
#include <mutex>

namespace fake {
namespace {

// The latest time of something, by ranges of addresses that do not overlap.
class Times {
 public:
  void set(uintptr_t start, uintptr_t end, int64_t time) {
    forget(start, end);
    ranges_[start] = {end, time};
  }
  void forget(uintptr_t start, uintptr_t end) {
    split(start);
    split(end);
    ranges_.erase(ranges_.lower_bound(start), ranges_.lower_bound(end));
  }
  int64_t latest(uintptr_t start, uintptr_t end) const {
    auto range = ranges_.upper_bound(start);
    if (range != ranges_.begin() && std::prev(range)->second.end > start) {
      --range;
    }
    int64_t latest = 0;
    for (; range != ranges_.end() && range->first < end; ++range) {
      latest = std::max(latest, range->second.time);
    }
    return latest;
  }

 private:
  struct Range {
    uintptr_t end;
    int64_t time;
  };
  void split(uintptr_t at) {
    auto range = ranges_.upper_bound(at);
    if (range == ranges_.begin() || (--range)->second.end <= at || range->first == at) {
      return;
    }
    ranges_[at] = range->second;
    range->second.end = at;
  }
  std::map<uintptr_t, Range> ranges_;
};

std::mutex lock;
int64_t now = 1; // how much the main streams have been given
int64_t seen_by_host = 0; // how much of that the host knows to be done
std::map<Handle, int64_t> seen_by_stream; // or a side stream
Times reads, writes;

} // namespace

void main_uses(const void* address, size_t nbytes, Access access) {
  const auto start = reinterpret_cast<uintptr_t>(address);
  if (nbytes == 0) {
    return;
  }
  std::lock_guard<std::mutex> hold(lock);
  now++;
  if (access == Access::kNone) {
    reads.forget(start, start + nbytes);
    writes.forget(start, start + nbytes);
  } else {
    (access == Access::kWrite ? writes : reads).set(start, start + nbytes, now);
  }
}

bool overtakes_main(const void* address, size_t nbytes, Access access, Handle stream) {
  const auto start = reinterpret_cast<uintptr_t>(address);
  std::lock_guard<std::mutex> hold(lock);
  int64_t used = writes.latest(start, start + nbytes);
  if (access == Access::kWrite) {
    used = std::max(used, reads.latest(start, start + nbytes));
  }
  return used > std::max(seen_by_host, seen_by_stream[stream]);
}

int64_t position_of(Handle stream) {
  std::lock_guard<std::mutex> hold(lock);
  return stream ? seen_by_stream[stream] : now;
}

void stream_has_seen(Handle stream, int64_t position) {
  std::lock_guard<std::mutex> hold(lock);
  if (stream) {
    seen_by_stream[stream] = std::max(seen_by_stream[stream], position);
  }
}

void host_has_seen(int64_t position) {
  std::lock_guard<std::mutex> hold(lock);
  seen_by_host = std::max(seen_by_host, position);
}

bool host_knows(int64_t position) {
  std::lock_guard<std::mutex> hold(lock);
  return seen_by_host >= position;
}

} // namespace fake
