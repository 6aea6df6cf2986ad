#include "ranges.h"

#include <stdlib.h>

struct range *add(struct range **list, uint64_t start, uint64_t size)
{
    struct range *range = calloc(1, sizeof *range);
    range->start = start;
    range->size = size;
    range->next = *list;
    return *list = range;
}

void drop(struct range **list, struct range *range)
{
    while (*list != range)
        list = &(*list)->next;
    *list = range->next;
    free(range);
}

struct range *starting_at(struct range *list, uint64_t start)
{
    while (list && list->start != start)
        list = list->next;
    return list;
}

struct range *containing(struct range *list, uint64_t start, uint64_t size)
{
    while (list && (start < list->start || start + size > list->start + list->size))
        list = list->next;
    return list;
}

struct range *overlapping(struct range *list, uint64_t start, uint64_t size)
{
    while (list && (start >= list->start + list->size || list->start >= start + size))
        list = list->next;
    return list;
}
