/* Lists of address ranges: what is reserved, mapped, allocated or locked. */
#ifndef RANGES_H
#define RANGES_H

#include <stdint.h>

struct handle;

struct range {
    struct range *next;
    uint64_t start, size;
    struct handle *handle; /* of a mapping */
    int device;            /* of an allocation */
    int access;            /* of a mapping: readable and writable */
};

struct range *add(struct range **list, uint64_t start, uint64_t size);
void drop(struct range **list, struct range *range);
struct range *starting_at(struct range *list, uint64_t start);
struct range *containing(struct range *list, uint64_t start, uint64_t size);
struct range *overlapping(struct range *list, uint64_t start, uint64_t size);

#endif
