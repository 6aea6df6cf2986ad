/* A CUDA driver on host memory: the functions that comfy-aimdo looks up, the few more that a backend needs, and controls.
 *
 * One device, or two. A device address is an ordinary address of this process that cannot be accessed while no memory is mapped
 * there, so a use of memory that was taken away ends in SIGSEGV. New memory is filled with the poison byte.
 *
 * Streams keep what they are given. In eager mode it takes effect at once, as on an endlessly fast bus; in deferred mode
 * only when something waits for it, as on an endlessly slow one. The main stream (NULL) is the host: its kernels are the
 * tests' own arithmetic, done at once, so what it is given and what it waits for takes effect at once too.
 */
#ifndef SIM_H
#define SIM_H

#include <stddef.h>
#include <stdint.h>

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef unsigned long long CUhandle; /* CUmemGenericAllocationHandle */
typedef struct stream *CUstream;
typedef struct event *CUevent;

enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    NOT_SUPPORTED = 801,
    UNKNOWN = 999,
};

/* comfy-aimdo patches the entry of some of these, so each keeps a body of its own. */
#define API __attribute__((visibility("default"), noinline, noipa))

/* F(name that is looked up, symbol) */
#define DRIVER_FUNCTIONS(F)                                                                                            \
    F(cuInit, cuInit)                                                                                                  \
    F(cuGetErrorString, cuGetErrorString)                                                                              \
    F(cuCtxGetDevice, cuCtxGetDevice)                                                                                  \
    F(cuCtxSynchronize, cuCtxSynchronize)                                                                              \
    F(cuDeviceGetCount, cuDeviceGetCount)                                                                              \
    F(cuDeviceGet, cuDeviceGet)                                                                                        \
    F(cuDeviceGetAttribute, cuDeviceGetAttribute)                                                                      \
    F(cuDeviceTotalMem, cuDeviceTotalMem_v2)                                                                           \
    F(cuDeviceGetName, cuDeviceGetName)                                                                                \
    F(cuDeviceGetUuid, cuDeviceGetUuid_v2)                                                                             \
    F(cuMemGetInfo, cuMemGetInfo_v2)                                                                                   \
    F(cuMemAlloc, cuMemAlloc_v2)                                                                                       \
    F(cuMemFree, cuMemFree_v2)                                                                                         \
    F(cuMemAllocAsync, cuMemAllocAsync)                                                                                \
    F(cuMemFreeAsync, cuMemFreeAsync)                                                                                  \
    F(cuMemAllocHost, cuMemAllocHost_v2)                                                                               \
    F(cuMemFreeHost, cuMemFreeHost)                                                                                    \
    F(cuMemHostRegister, cuMemHostRegister_v2)                                                                         \
    F(cuMemHostUnregister, cuMemHostUnregister)                                                                        \
    F(cuMemAddressReserve, cuMemAddressReserve)                                                                        \
    F(cuMemAddressFree, cuMemAddressFree)                                                                              \
    F(cuMemCreate, cuMemCreate)                                                                                        \
    F(cuMemMap, cuMemMap)                                                                                              \
    F(cuMemSetAccess, cuMemSetAccess)                                                                                  \
    F(cuMemUnmap, cuMemUnmap)                                                                                          \
    F(cuMemRelease, cuMemRelease)                                                                                      \
    F(cuMemcpyHtoD, cuMemcpyHtoD_v2)                                                                                   \
    F(cuMemcpyDtoH, cuMemcpyDtoH_v2)                                                                                   \
    F(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2)                                                                         \
    F(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2)                                                                         \
    F(cuStreamCreate, cuStreamCreate)                                                                                  \
    F(cuStreamDestroy, cuStreamDestroy_v2)                                                                             \
    F(cuStreamSynchronize, cuStreamSynchronize)                                                                        \
    F(cuStreamWaitEvent, cuStreamWaitEvent)                                                                            \
    F(cuStreamQuery, cuStreamQuery)                                                                                    \
    F(cuLaunchHostFunc, cuLaunchHostFunc)                                                                              \
    F(cuEventCreate, cuEventCreate)                                                                                    \
    F(cuEventDestroy, cuEventDestroy_v2)                                                                               \
    F(cuEventRecord, cuEventRecord)                                                                                    \
    F(cuEventQuery, cuEventQuery)                                                                                      \
    F(cuEventSynchronize, cuEventSynchronize)

enum function {
#define F(name, symbol) FN_##name,
    DRIVER_FUNCTIONS(F)
#undef F
    FUNCTIONS
};

/* What a test may set. poison: a byte, or -1 for zeroes. deferred: 0 or 1. trace: calls are written to stderr. */
#define SETTINGS(S) S(devices) S(pin_limit) S(poison) S(deferred) S(trace)

/* What each device has of its own: two settings, three statistics. Controls see those of the thread's current device. */
#define OF_DEVICE(S) S(capacity) S(others) S(mapped) S(allocated) S(peak)
#define MAX_DEVICES 2

/* What a test may read. Sizes in bytes; `illegal` counts accesses to memory that was not there or not locked any more. */
#define STATISTICS(S)                                                                                                  \
    S(pinned) S(reserved) S(handles) S(events) S(streams) S(pending) S(refused) S(h2d_bytes) S(d2h_bytes) S(illegal)

struct sim {
#define S(name) int64_t name;
    struct { SETTINGS(S) } set;
    struct { STATISTICS(S) } stat;
    struct device { OF_DEVICE(S) } device[MAX_DEVICES];
#undef S
};

extern struct sim sim;

/* The device that a thread's calls are for, as the current context says on a GPU. */
extern _Thread_local CUdevice current_device;

/* Begins a driver function: counts the call and either returns the failure that a test asked for or takes the lock. */
#define ENTER(name)                                                                                                    \
    do {                                                                                                               \
        CUresult failure = sim_enter(FN_##name);                                                                       \
        if (failure != OK)                                                                                             \
            return failure;                                                                                            \
    } while (0)
/* Ends it: gives the lock back. */
#define LEAVE(result) return sim_leave(result)

CUresult sim_enter(enum function function); /* api.c */
CUresult sim_leave(CUresult result);

int device_memory(uint64_t address, size_t size); /* memory.c */
CUdevice device_at(uint64_t address);
int locked_memory(uint64_t address, size_t size);
void memory_setting_changed(void);

void run_everything(void); /* streams.c */
void forget_stream_error(void);

#endif
