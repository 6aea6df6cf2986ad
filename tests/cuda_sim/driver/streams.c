/* Streams, events and copies. */
#include "sim.h"

#include <stdlib.h>
#include <string.h>

/* One thing that a stream was given: a copy, a call, or to wait until another stream has come to a position. */
struct work {
    struct work *next;
    char *to;
    const char *from;
    size_t size;
    int to_device;
    char *staged; /* the bytes of a copy from pageable memory: the driver reads those before it returns */
    void (*function)(void *);
    void *argument;
    struct stream *other;
    uint64_t position;
};

struct stream {
    struct stream *next;
    struct work *first, **end;
    uint64_t given, done; /* pieces of work */
};

/* The state of a stream when the event was recorded; stream NULL: of the main stream, so always in the past. */
struct event {
    struct stream *stream;
    uint64_t position;
};

static struct stream *streams;
static CUresult sticky; /* a failed access ends a context: every wait reports it from then on */

/* The NULL stream under its three names. */
static int is_main(CUstream stream) { return (uintptr_t)stream <= 2; }

static int exists(CUstream stream)
{
    struct stream *known = streams;
    while (known && known != stream)
        known = known->next;
    return is_main(stream) || known;
}

void forget_stream_error(void) { sticky = OK; }

static void fail(void)
{
    sim.stat.illegal++;
    sticky = ILLEGAL_ADDRESS;
}

/* -- taking effect */

static void transfer(const struct work *work)
{
    uint64_t device = (uint64_t)(work->to_device ? work->to : work->from);
    uint64_t host = (uint64_t)(work->to_device ? work->from : work->to);
    if (!device_memory(device, work->size) || (!work->staged && !locked_memory(host, work->size))) {
        fail();
        return;
    }
    memcpy(work->to, work->staged ? work->staged : work->from, work->size);
    *(work->to_device ? &sim.stat.h2d_bytes : &sim.stat.d2h_bytes) += work->size;
}

static void run(struct stream *stream, uint64_t position);

static void take_effect(const struct work *work)
{
    if (work->other)
        run(work->other, work->position);
    else if (work->function)
        work->function(work->argument);
    else
        transfer(work);
}

static void run(struct stream *stream, uint64_t position)
{
    while (stream->done < position) {
        struct work *work = stream->first;
        stream->first = work->next;
        if (!stream->first)
            stream->end = &stream->first;
        stream->done++;
        sim.stat.pending--;
        take_effect(work);
        free(work->staged);
        free(work);
    }
}

void run_everything(void)
{
    for (struct stream *stream = streams; stream; stream = stream->next)
        run(stream, stream->given);
}

static void give(struct stream *stream, struct work work)
{
    if (is_main(stream)) {
        take_effect(&work);
        free(work.staged);
        return;
    }
    struct work *copy = malloc(sizeof *copy);
    *copy = work;
    copy->next = NULL;
    *stream->end = copy;
    stream->end = &copy->next;
    stream->given++;
    sim.stat.pending++;
    if (!sim.set.deferred)
        run(stream, stream->given);
}

/* -- copies */

static CUresult copy(char *to, const char *from, size_t size, int to_device, CUstream stream)
{
    struct work work = {.to = to, .from = from, .size = size, .to_device = to_device};
    if (!exists(stream))
        return INVALID_HANDLE;
    if (!device_memory((uint64_t)(to_device ? to : from), size))
        return INVALID_VALUE;
    if (sticky)
        return sticky;
    if (!locked_memory((uint64_t)(to_device ? from : to), size)) {
        work.staged = malloc(size ? size : 1);
        if (to_device) {
            memcpy(work.staged, from, size);
        } else { /* into pageable memory: the driver waits */
            if (!is_main(stream))
                run(stream, stream->given);
            memcpy(work.staged, from, size);
            give(NULL, work);
            return sticky;
        }
    }
    give(stream, work);
    return OK;
}

API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, CUstream stream)
{
    ENTER(cuMemcpyHtoDAsync);
    LEAVE(copy((char *)to, from, size, 1, stream));
}

API CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, CUstream stream)
{
    ENTER(cuMemcpyDtoHAsync);
    LEAVE(copy(to, (const char *)from, size, 0, stream));
}

API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t size)
{
    ENTER(cuMemcpyHtoD);
    LEAVE(copy((char *)to, from, size, 1, NULL));
}

API CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t size)
{
    ENTER(cuMemcpyDtoH);
    LEAVE(copy(to, (const char *)from, size, 0, NULL));
}

/* -- streams */

API CUresult cuStreamCreate(CUstream *out, unsigned flags)
{
    ENTER(cuStreamCreate);
    struct stream *stream = calloc(1, sizeof *stream);
    stream->end = &stream->first;
    stream->next = streams;
    streams = *out = stream;
    sim.stat.streams++;
    LEAVE(OK);
}

API CUresult cuStreamDestroy_v2(CUstream stream)
{
    ENTER(cuStreamDestroy);
    if (is_main(stream) || !exists(stream))
        LEAVE(INVALID_HANDLE);
    run(stream, stream->given);
    struct stream **link = &streams;
    while (*link != stream)
        link = &(*link)->next;
    *link = stream->next;
    sim.stat.streams--;
    /* Events may still name it; it stays as the record that all of its work is done. */
    LEAVE(OK);
}

API CUresult cuStreamSynchronize(CUstream stream)
{
    ENTER(cuStreamSynchronize);
    if (!exists(stream))
        LEAVE(INVALID_HANDLE);
    if (!is_main(stream))
        run(stream, stream->given);
    LEAVE(sticky);
}

API CUresult cuStreamQuery(CUstream stream)
{
    ENTER(cuStreamQuery);
    if (!exists(stream))
        LEAVE(INVALID_HANDLE);
    LEAVE(!is_main(stream) && stream->done < stream->given ? NOT_READY : sticky);
}

API CUresult cuLaunchHostFunc(CUstream stream, void (*function)(void *), void *argument)
{
    ENTER(cuLaunchHostFunc);
    if (!exists(stream) || !function)
        LEAVE(INVALID_HANDLE);
    give(stream, (struct work){.function = function, .argument = argument});
    LEAVE(sticky);
}

API CUresult cuCtxSynchronize(void)
{
    ENTER(cuCtxSynchronize);
    run_everything();
    LEAVE(sticky);
}

/* -- events */

API CUresult cuEventCreate(CUevent *out, unsigned flags)
{
    ENTER(cuEventCreate);
    *out = calloc(1, sizeof **out);
    sim.stat.events++;
    LEAVE(OK);
}

API CUresult cuEventDestroy_v2(CUevent event)
{
    ENTER(cuEventDestroy);
    if (!event)
        LEAVE(INVALID_HANDLE);
    free(event);
    sim.stat.events--;
    LEAVE(OK);
}

API CUresult cuEventRecord(CUevent event, CUstream stream)
{
    ENTER(cuEventRecord);
    if (!event || !exists(stream))
        LEAVE(INVALID_HANDLE);
    event->stream = is_main(stream) ? NULL : stream;
    event->position = event->stream ? stream->given : 0;
    LEAVE(OK);
}

API CUresult cuEventQuery(CUevent event)
{
    ENTER(cuEventQuery);
    if (!event)
        LEAVE(INVALID_HANDLE);
    LEAVE(event->stream && event->stream->done < event->position ? NOT_READY : sticky);
}

API CUresult cuEventSynchronize(CUevent event)
{
    ENTER(cuEventSynchronize);
    if (!event)
        LEAVE(INVALID_HANDLE);
    if (event->stream)
        run(event->stream, event->position);
    LEAVE(sticky);
}

API CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
    ENTER(cuStreamWaitEvent);
    if (!event || !exists(stream))
        LEAVE(INVALID_HANDLE);
    if (event->stream && event->stream != stream)
        give(stream, (struct work){.other = event->stream, .position = event->position});
    LEAVE(OK);
}
