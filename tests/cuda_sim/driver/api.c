/* The device's description, the look-up of functions, and what tests control. */
#define _GNU_SOURCE
#include "sim.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

struct sim sim = {
    .set = {.devices = 1, .pin_limit = INT64_MAX, .poison = -1},
    .device = {{.capacity = 1LL << 30}, {.capacity = 1LL << 30}},
};

_Thread_local CUdevice current_device;

/* Recursive: a host function that a stream runs may ask the controls. */
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

static const char *const names[] = {
#define F(name, symbol) #name,
    DRIVER_FUNCTIONS(F)
#undef F
};
static uint64_t calls[FUNCTIONS];

/* A failure that a test asked for: let `after` calls pass, then fail `times` (negative: for ever). */
static struct failure {
    int64_t after, times;
    CUresult error;
    uint64_t given;
} failures[FUNCTIONS];

CUresult sim_enter(enum function function)
{
    struct failure *failure = &failures[function];
    CUresult result = OK;

    pthread_mutex_lock(&lock);
    calls[function]++;
    if (failure->times) {
        if (failure->after > 0) {
            failure->after--;
        } else {
            failure->times -= failure->times > 0;
            failure->given++;
            result = failure->error;
        }
    }
    if (sim.set.trace)
        fprintf(stderr, "sim: %s%s\n", names[function], result ? " fails" : "");
    if (result)
        pthread_mutex_unlock(&lock);
    return result;
}

CUresult sim_leave(CUresult result)
{
    if (result && sim.set.trace)
        fprintf(stderr, "sim:   -> error %d\n", result);
    pthread_mutex_unlock(&lock);
    return result;
}

/* -- the device's description */

API CUresult cuInit(unsigned flags)
{
    ENTER(cuInit);
    LEAVE(OK);
}

API CUresult cuGetErrorString(CUresult error, const char **text)
{
    static const struct { CUresult error; const char *text; } texts[] = {
        {OK, "no error"}, {INVALID_VALUE, "invalid argument"}, {OUT_OF_MEMORY, "out of memory"},
        {INVALID_HANDLE, "invalid resource handle"}, {NOT_READY, "device not ready"},
        {ILLEGAL_ADDRESS, "an illegal memory access was encountered"},
        {ALREADY_REGISTERED, "part or all of the requested memory range is already mapped"},
        {NOT_REGISTERED, "pointer does not correspond to a registered memory region"},
    };
    *text = "unknown error";
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (texts[i].error == error)
            *text = texts[i].text;
    return OK;
}

API CUresult cuCtxGetDevice(CUdevice *device)
{
    ENTER(cuCtxGetDevice);
    *device = current_device;
    LEAVE(OK);
}

API CUresult cuDeviceGetCount(int *count)
{
    ENTER(cuDeviceGetCount);
    *count = (int)sim.set.devices;
    LEAVE(OK);
}

API CUresult cuDeviceGet(CUdevice *device, int index)
{
    ENTER(cuDeviceGet);
    *device = index;
    LEAVE(index >= 0 && index < sim.set.devices ? OK : INVALID_DEVICE);
}

API CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device)
{
    ENTER(cuDeviceGetAttribute);
    *value = 0; /* a discrete card without extras */
    LEAVE(OK);
}

API CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device)
{
    ENTER(cuDeviceTotalMem);
    *bytes = sim.device[device].capacity;
    LEAVE(OK);
}

API CUresult cuDeviceGetName(char *name, int size, CUdevice device)
{
    ENTER(cuDeviceGetName);
    snprintf(name, size, "Simulated device");
    LEAVE(OK);
}

API CUresult cuDeviceGetUuid_v2(unsigned char *uuid, CUdevice device)
{
    ENTER(cuDeviceGetUuid);
    memset(uuid, 0x51 + device, 16);
    LEAVE(OK);
}

/* -- look-up */

/* Asks the dynamic linker, so that the table of names needs no prototypes. */
API CUresult cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags)
{
    static const char *const symbols[] = {
#define F(name, symbol) #symbol,
        DRIVER_FUNCTIONS(F)
#undef F
    };
    const int per_thread_default_stream = 2;
    Dl_info self;
    char symbol[64];

    *function = NULL;
    dladdr((void *)cuGetProcAddress, &self);
    void *library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    for (int i = 0; i < FUNCTIONS; i++) {
        if (strcmp(names[i], name))
            continue;
        snprintf(symbol, sizeof symbol, "%s_ptsz", symbols[i]);
        if (flags & per_thread_default_stream)
            *function = dlsym(library, symbol);
        if (!*function)
            *function = dlsym(library, symbols[i]);
    }
    dlclose(library);
    return *function ? OK : NOT_FOUND;
}

/* -- controls */

static int64_t *of_device(const char *name)
{
#define S(field)                                                                                                       \
    if (!strcmp(name, #field))                                                                                         \
        return &sim.device[current_device].field;
    OF_DEVICE(S)
#undef S
    return NULL;
}

static int64_t *setting(const char *name)
{
#define S(field)                                                                                                       \
    if (!strcmp(name, #field))                                                                                         \
        return &sim.set.field;
    SETTINGS(S)
#undef S
    return of_device(name);
}

static int64_t *statistic(const char *name)
{
#define S(field)                                                                                                       \
    if (!strcmp(name, #field))                                                                                         \
        return &sim.stat.field;
    STATISTICS(S)
#undef S
    return of_device(name);
}

static int function_named(const char *name)
{
    int i = 0;
    while (i < FUNCTIONS && strcmp(names[i], name))
        i++;
    return i;
}

/* Makes a device this thread's current one. */
API void sim_use(CUdevice device) { current_device = device; }

/* The controls answer -1 where there is no such name. */

API int64_t sim_get(const char *name)
{
    pthread_mutex_lock(&lock);
    int64_t *value = statistic(name) ? statistic(name) : setting(name);
    int64_t result = value ? *value : -1;
    pthread_mutex_unlock(&lock);
    return result;
}

API int sim_set(const char *name, int64_t value)
{
    pthread_mutex_lock(&lock);
    int64_t *found = setting(name);
    if (found) {
        *found = value;
        if (found == &sim.set.poison)
            memory_setting_changed();
        if (found == &sim.set.deferred && !value)
            run_everything();
    }
    pthread_mutex_unlock(&lock);
    return found ? 0 : -1;
}

API int sim_fail(const char *name, int64_t after, int64_t times, int error)
{
    int function = function_named(name);
    if (function == FUNCTIONS)
        return -1;
    pthread_mutex_lock(&lock);
    failures[function] = (struct failure){.after = after, .times = times, .error = error};
    pthread_mutex_unlock(&lock);
    return 0;
}

API int64_t sim_calls(const char *name)
{
    int function = function_named(name);
    return function == FUNCTIONS ? -1 : (int64_t)calls[function];
}

/* Failures that a function has given since it was told to fail. */
API int64_t sim_failed(const char *name)
{
    int function = function_named(name);
    return function == FUNCTIONS ? -1 : (int64_t)failures[function].given;
}

API int sim_is_device_memory(uint64_t address, size_t size)
{
    pthread_mutex_lock(&lock);
    int result = device_memory(address, size);
    pthread_mutex_unlock(&lock);
    return result;
}

API int sim_device_at(uint64_t address)
{
    pthread_mutex_lock(&lock);
    int result = device_at(address);
    pthread_mutex_unlock(&lock);
    return result;
}

API int sim_is_locked_memory(uint64_t address, size_t size)
{
    pthread_mutex_lock(&lock);
    int result = locked_memory(address, size);
    pthread_mutex_unlock(&lock);
    return result;
}

API void sim_no_faults(void)
{
    pthread_mutex_lock(&lock);
    for (int i = 0; i < FUNCTIONS; i++)
        failures[i].times = 0;
    pthread_mutex_unlock(&lock);
}

/* Failures, counters and the sticky error are as at the start; memory, streams and events stay. */
API void sim_reset(void)
{
    pthread_mutex_lock(&lock);
    memset(failures, 0, sizeof failures);
    memset(calls, 0, sizeof calls);
    forget_stream_error();
    sim.stat.illegal = sim.stat.refused = sim.stat.h2d_bytes = sim.stat.d2h_bytes = 0;
    for (struct device *device = sim.device; device < sim.device + MAX_DEVICES; device++)
        device->peak = device->mapped + device->allocated;
    pthread_mutex_unlock(&lock);
}
