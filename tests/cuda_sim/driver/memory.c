/* Device memory, mapped and plain, and locked host memory. */
#define _GNU_SOURCE
#include "ranges.h"
#include "sim.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define GRANULARITY (2ULL << 20)
#define POISON_FILE (32ULL << 20)

/* A piece of physical memory. Its bytes live where it is mapped, so it can be mapped in one place only. */
struct handle {
    struct handle *next;
    CUhandle id;
    size_t size;
    CUdevice device;
    int released, mapped;
};

/* The heads of CUmemAllocationProp and CUmemAccessDesc. */
struct properties { int type, handle_types, location_type, location; };
struct access { int location_type, location, flags; };

static struct handle *handles;
static struct range *reservations, *mappings, *allocations, *registrations, *host_allocations;
static int poison_file = -1;

/* Whether all of a range is device memory that can be accessed. */
int device_memory(uint64_t address, size_t size)
{
    if (containing(allocations, address, size))
        return 1;
    while (size) {
        struct range *mapping = containing(mappings, address, 1);
        if (!mapping || !mapping->access)
            return 0;
        uint64_t rest = mapping->start + mapping->size - address;
        if (rest >= size)
            return 1;
        address += rest;
        size -= rest;
    }
    return 1;
}

/* The device whose memory lies at an address; -1 for none. */
CUdevice device_at(uint64_t address)
{
    struct range *range = containing(allocations, address, 1);
    if (range)
        return range->device;
    range = containing(mappings, address, 1);
    return range ? range->handle->device : -1;
}

/* Whether all of a range is locked host memory. */
int locked_memory(uint64_t address, size_t size)
{
    return containing(registrations, address, size) || containing(host_allocations, address, size);
}

/* -- pages. New memory is a private view of a file of poison: reading shows it, and only what is written costs memory. */

void memory_setting_changed(void)
{
    if (poison_file >= 0)
        close(poison_file);
    poison_file = -1;
    if (sim.set.poison < 0)
        return;
    poison_file = memfd_create("poison", MFD_CLOEXEC);
    if (ftruncate(poison_file, POISON_FILE))
        abort();
    char *bytes = mmap(NULL, POISON_FILE, PROT_WRITE, MAP_SHARED, poison_file, 0);
    memset(bytes, (int)sim.set.poison, POISON_FILE);
    munmap(bytes, POISON_FILE);
}

static void *addresses(uint64_t size)
{
    return mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static int back_with_pages(uint64_t start, uint64_t size, int protection)
{
    int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
    if (poison_file < 0)
        return mmap((void *)start, size, protection, flags | MAP_ANONYMOUS, -1, 0) != MAP_FAILED;
    for (uint64_t done = 0; done < size; done += POISON_FILE) {
        uint64_t part = size - done < POISON_FILE ? size - done : POISON_FILE;
        if (mmap((void *)(start + done), part, protection, flags, poison_file, 0) == MAP_FAILED)
            return 0;
    }
    return 1;
}

static void take_pages_away(uint64_t start, uint64_t size)
{
    mmap((void *)start, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

/* -- the device's books */

static int64_t in_use(const struct device *device) { return device->mapped + device->allocated; }

static int has_room_for(uint64_t size, const struct device *device)
{
    if (in_use(device) + device->others + (int64_t)size <= device->capacity)
        return 1;
    sim.stat.refused++;
    return 0;
}

static void note_peak(struct device *device)
{
    if (in_use(device) > device->peak)
        device->peak = in_use(device);
}

API CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes)
{
    ENTER(cuMemGetInfo);
    const struct device *device = &sim.device[current_device];
    int64_t left = device->capacity - device->others - in_use(device);
    *total_bytes = device->capacity;
    *free_bytes = left > 0 ? left : 0;
    LEAVE(OK);
}

/* -- virtual memory */

API CUresult cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t alignment, CUdeviceptr wanted,
                                 unsigned long long flags)
{
    ENTER(cuMemAddressReserve);
    if (!size || size % GRANULARITY)
        LEAVE(INVALID_VALUE);
    char *start = addresses(size + GRANULARITY);
    if (start == MAP_FAILED)
        LEAVE(OUT_OF_MEMORY);
    /* Reserved with room to align; what lies on both sides goes back. */
    char *aligned = (char *)(((uintptr_t)start + GRANULARITY - 1) & ~(GRANULARITY - 1));
    if (aligned > start)
        munmap(start, aligned - start);
    munmap(aligned + size, start + GRANULARITY - aligned);
    add(&reservations, (uint64_t)aligned, size);
    sim.stat.reserved += size;
    *address = (CUdeviceptr)aligned;
    LEAVE(OK);
}

API CUresult cuMemAddressFree(CUdeviceptr address, size_t size)
{
    ENTER(cuMemAddressFree);
    struct range *range = starting_at(reservations, address);
    if (!range || range->size != size || overlapping(mappings, address, size))
        LEAVE(INVALID_VALUE);
    munmap((void *)address, size);
    sim.stat.reserved -= size;
    drop(&reservations, range);
    LEAVE(OK);
}

static struct handle *handle_of(CUhandle id)
{
    struct handle *handle = handles;
    while (handle && handle->id != id)
        handle = handle->next;
    return handle;
}

static void free_if_unused(struct handle *handle)
{
    if (!handle->released || handle->mapped)
        return;
    struct handle **link = &handles;
    while (*link != handle)
        link = &(*link)->next;
    *link = handle->next;
    sim.device[handle->device].mapped -= handle->size;
    sim.stat.handles--;
    free(handle);
}

API CUresult cuMemCreate(CUhandle *out, size_t size, const struct properties *properties, unsigned long long flags)
{
    static CUhandle last_id;

    ENTER(cuMemCreate);
    if (!size || size % GRANULARITY || properties->location < 0 || properties->location >= sim.set.devices)
        LEAVE(INVALID_VALUE);
    struct device *device = &sim.device[properties->location];
    if (!has_room_for(size, device))
        LEAVE(OUT_OF_MEMORY);
    struct handle *handle = calloc(1, sizeof *handle);
    handle->id = *out = ++last_id;
    handle->size = size;
    handle->device = properties->location;
    handle->next = handles;
    handles = handle;
    device->mapped += size;
    sim.stat.handles++;
    note_peak(device);
    LEAVE(OK);
}

API CUresult cuMemRelease(CUhandle id)
{
    ENTER(cuMemRelease);
    struct handle *handle = handle_of(id);
    if (!handle || handle->released)
        LEAVE(INVALID_VALUE);
    handle->released = 1;
    free_if_unused(handle);
    LEAVE(OK);
}

API CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset, CUhandle id, unsigned long long flags)
{
    ENTER(cuMemMap);
    struct handle *handle = handle_of(id);
    if (!handle || handle->released || offset || size != handle->size || address % GRANULARITY ||
        !containing(reservations, address, size) || overlapping(mappings, address, size))
        LEAVE(INVALID_VALUE);
    if (handle->mapped)
        LEAVE(NOT_SUPPORTED);
    if (!back_with_pages(address, size, PROT_NONE))
        LEAVE(OUT_OF_MEMORY);
    add(&mappings, address, size)->handle = handle;
    handle->mapped = 1;
    LEAVE(OK);
}

API CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const struct access *access, size_t count)
{
    ENTER(cuMemSetAccess);
    static const int protections[] = {PROT_NONE, PROT_READ, PROT_NONE, PROT_READ | PROT_WRITE};
    int found = 0;
    for (struct range *mapping = mappings; mapping; mapping = mapping->next) {
        if (mapping->start < address || mapping->start + mapping->size > address + size)
            continue;
        mprotect((void *)mapping->start, mapping->size, protections[access->flags & 3]);
        mapping->access = access->flags == 3;
        found = 1;
    }
    LEAVE(found ? OK : INVALID_VALUE);
}

API CUresult cuMemUnmap(CUdeviceptr address, size_t size)
{
    ENTER(cuMemUnmap);
    int found = 0;
    for (struct range *mapping = mappings, *next; mapping; mapping = next) {
        next = mapping->next;
        if (mapping->start < address || mapping->start + mapping->size > address + size)
            continue;
        struct handle *handle = mapping->handle;
        take_pages_away(mapping->start, mapping->size);
        drop(&mappings, mapping);
        handle->mapped = 0;
        free_if_unused(handle);
        found = 1;
    }
    LEAVE(found ? OK : INVALID_VALUE);
}

/* -- plain allocations. comfy-aimdo puts itself before these six. */

static CUresult allocate(CUdeviceptr *address, size_t size)
{
    struct device *device = &sim.device[current_device];
    uint64_t rounded = (size + 511) & ~511ULL;
    if (!size)
        return INVALID_VALUE;
    if (!has_room_for(rounded, device))
        return OUT_OF_MEMORY;
    char *start = addresses(rounded);
    if (start == MAP_FAILED || !back_with_pages((uint64_t)start, rounded, PROT_READ | PROT_WRITE))
        return OUT_OF_MEMORY;
    add(&allocations, (uint64_t)start, rounded)->device = current_device;
    device->allocated += rounded;
    note_peak(device);
    *address = (CUdeviceptr)start;
    return OK;
}

static CUresult give_back(CUdeviceptr address, int waits)
{
    struct range *range = starting_at(allocations, address);
    if (!range)
        return INVALID_VALUE;
    if (waits)
        run_everything();
    sim.device[range->device].allocated -= range->size;
    munmap((void *)address, range->size);
    drop(&allocations, range);
    return OK;
}

API CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size)
{
    ENTER(cuMemAlloc);
    LEAVE(allocate(address, size));
}

API CUresult cuMemFree_v2(CUdeviceptr address)
{
    ENTER(cuMemFree);
    LEAVE(give_back(address, 1));
}

API CUresult cuMemAllocAsync(CUdeviceptr *address, size_t size, CUstream stream)
{
    ENTER(cuMemAllocAsync);
    LEAVE(allocate(address, size));
}

API CUresult cuMemAllocAsync_ptsz(CUdeviceptr *address, size_t size, CUstream stream)
{
    ENTER(cuMemAllocAsync);
    LEAVE(allocate(address, size));
}

API CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream)
{
    ENTER(cuMemFreeAsync);
    LEAVE(give_back(address, 0));
}

API CUresult cuMemFreeAsync_ptsz(CUdeviceptr address, CUstream stream)
{
    ENTER(cuMemFreeAsync);
    LEAVE(give_back(address, 0));
}

/* -- host memory */

static int may_lock(uint64_t size)
{
    if (sim.stat.pinned + (int64_t)size <= sim.set.pin_limit)
        return 1;
    sim.stat.refused++;
    return 0;
}

API CUresult cuMemAllocHost_v2(void **address, size_t size)
{
    ENTER(cuMemAllocHost);
    if (!size)
        LEAVE(INVALID_VALUE);
    if (!may_lock(size))
        LEAVE(OUT_OF_MEMORY);
    char *start = addresses(size);
    if (start == MAP_FAILED || !back_with_pages((uint64_t)start, size, PROT_READ | PROT_WRITE))
        LEAVE(OUT_OF_MEMORY);
    add(&host_allocations, (uint64_t)start, size);
    sim.stat.pinned += size;
    *address = start;
    LEAVE(OK);
}

API CUresult cuMemFreeHost(void *address)
{
    ENTER(cuMemFreeHost);
    struct range *range = starting_at(host_allocations, (uint64_t)address);
    if (!range)
        LEAVE(INVALID_VALUE);
    sim.stat.pinned -= range->size;
    munmap(address, range->size);
    drop(&host_allocations, range);
    LEAVE(OK);
}

API CUresult cuMemHostRegister_v2(void *address, size_t size, unsigned flags)
{
    ENTER(cuMemHostRegister);
    if (!address || !size)
        LEAVE(INVALID_VALUE);
    if (overlapping(registrations, (uint64_t)address, size))
        LEAVE(ALREADY_REGISTERED);
    if (!may_lock(size))
        LEAVE(OUT_OF_MEMORY);
    add(&registrations, (uint64_t)address, size);
    sim.stat.pinned += size;
    LEAVE(OK);
}

API CUresult cuMemHostUnregister(void *address)
{
    ENTER(cuMemHostUnregister);
    struct range *range = starting_at(registrations, (uint64_t)address);
    if (!range)
        LEAVE(NOT_REGISTERED);
    sim.stat.pinned -= range->size;
    drop(&registrations, range);
    LEAVE(OK);
}
