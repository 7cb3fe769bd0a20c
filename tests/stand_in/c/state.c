/* Counters, memory, streams, captures: what the device knows. The libraries' entry points are in the other files. */
#include "stand_in.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define GIB ((size_t)1 << 30)
#define PAGE ((size_t)4096)
#define LARGE (16 * PAGE) /* from here on, zeros are made by giving pages back */
#define STRETCH (256 * PAGE) /* of a copy on the device, looked at as one */

const char DEVICE_NAME[] = "NVIDIA H100 80GB HBM3";
static const double DEFAULT_GIB = 79.1; /* what such a card reports */
static const size_t CONTEXT_BYTES = GIB / 2; /* taken by CUDA itself */

/* Counters. */
static const char *const NAMES[COUNTERS] = {
    [LAUNCHES] = "launches",       [CAPTURED] = "captured",
    [GRAPH_LAUNCHES] = "graph_launches", [COPIES] = "copies",
    [PAGEABLE_COPIES] = "pageable_copies", [SYNCS] = "syncs",
    [ALLOCATIONS] = "allocations", [HOST_ALLOCATIONS] = "host_allocations",
    [EVENTS] = "events",
};
static atomic_ullong counters[COUNTERS];

void count(enum counter which) { atomic_fetch_add_explicit(&counters[which], 1, memory_order_relaxed); }
EXPORT unsigned long long stand_in_count(int which) { return counters[which]; }
EXPORT const char *stand_in_name(int which) { return which < COUNTERS ? NAMES[which] : NULL; }

/* Settings. */
static double setting(const char *name, double otherwise) {
  const char *text = getenv(name);
  return text && *text ? strtod(text, NULL) : otherwise;
}
static size_t total_bytes, used_bytes, pinned_bytes;
static double milliseconds;
static atomic_llong fail_at; /* launches after which the device has failed; 0: never */

__attribute__((constructor)) static void read_settings(void) {
  total_bytes = (size_t)(setting("ST_FAST_STAND_IN_GIB", DEFAULT_GIB) * (double)GIB);
  milliseconds = setting("ST_FAST_STAND_IN_EVENT_MS", 1.0);
  fail_at = (long long)setting("ST_FAST_STAND_IN_FAIL_AFTER", 0);
}
EXPORT void stand_in_set_bytes(size_t bytes) { total_bytes = bytes; }
EXPORT void stand_in_fail_after(long long launches) {
  fail_at = launches ? (long long)counters[LAUNCHES] + launches : 0;
}
EXPORT size_t stand_in_used_bytes(void) { return used_bytes; }
EXPORT size_t stand_in_pinned_bytes(void) { return pinned_bytes; }
float event_milliseconds(void) { return (float)milliseconds; }

int device_count(void) {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  return visible && (!*visible || *visible == '-') ? 0 : 1;
}

/* Errors. */
static const struct { int code; const char *name, *text; } ERRORS[] = {
    {OK, "cudaSuccess", "no error"},
    {INVALID_VALUE, "cudaErrorInvalidValue", "invalid argument"},
    {OUT_OF_MEMORY, "cudaErrorMemoryAllocation", "out of memory"},
    {NO_DEVICE, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {INVALID_HANDLE, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {NOT_FOUND, "cudaErrorSymbolNotFound", "named symbol not found"},
    {ILLEGAL_ADDRESS, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {NOT_SUPPORTED, "cudaErrorNotSupported", "operation not supported"},
    {CAPTURE_UNSUPPORTED, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {999, "cudaErrorUnknown", "an error that the stand-in does not know"},
};
static size_t error_entry(int code) {
  size_t last = sizeof ERRORS / sizeof *ERRORS - 1, i = 0;
  while (i < last && ERRORS[i].code != code) i++;
  return i;
}
const char *error_name(int code) { return ERRORS[error_entry(code)].name; }
const char *error_text(int code) { return ERRORS[error_entry(code)].text; }

int status(void) { return fail_at && counters[LAUNCHES] >= (unsigned long long)fail_at ? ILLEGAL_ADDRESS : OK; }

int unsupported(const char *name) {
  fprintf(stderr, "stand-in CUDA: %s is not there\n", name);
  return NOT_SUPPORTED;
}

/* Memory: ranges in order of their addresses. */
struct range {
  char *start;
  size_t bytes, counted;
  enum kind kind;
  bool mapped; /* by us */
};
static struct range *ranges;
static size_t range_count, range_room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static size_t upper_bound(const void *address) { /* of the ranges that start at or below the address */
  size_t low = 0, high = range_count;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (ranges[middle].start <= (const char *)address) low = middle + 1;
    else high = middle;
  }
  return low;
}

static void insert(struct range range) {
  pthread_mutex_lock(&lock);
  if (range_count == range_room) {
    range_room = range_room ? 2 * range_room : 256;
    ranges = realloc(ranges, range_room * sizeof *ranges);
    if (!ranges) abort();
  }
  size_t at = upper_bound(range.start);
  memmove(ranges + at + 1, ranges + at, (range_count - at) * sizeof *ranges);
  ranges[at] = range;
  range_count++;
  pthread_mutex_unlock(&lock);
}

enum kind kind_of(const void *address, void **start, size_t *bytes) {
  enum kind kind = UNKNOWN;
  pthread_mutex_lock(&lock);
  size_t after = upper_bound(address);
  if (after) {
    const struct range *found = ranges + after - 1;
    if ((const char *)address < found->start + found->bytes) {
      kind = found->kind;
      if (start) *start = found->start;
      if (bytes) *bytes = found->bytes;
    }
  }
  pthread_mutex_unlock(&lock);
  return kind;
}

int take(size_t bytes) {
  int error = OK;
  pthread_mutex_lock(&lock);
  if (used_bytes + bytes + CONTEXT_BYTES > total_bytes) error = OUT_OF_MEMORY;
  else used_bytes += bytes;
  pthread_mutex_unlock(&lock);
  return error;
}

void give_back(size_t bytes) {
  pthread_mutex_lock(&lock);
  used_bytes -= bytes;
  pthread_mutex_unlock(&lock);
}

void memory_info(size_t *free_bytes, size_t *total) {
  *total = total_bytes;
  *free_bytes = total_bytes > used_bytes + CONTEXT_BYTES ? total_bytes - used_bytes - CONTEXT_BYTES : 0;
}

static void *map(size_t bytes) { /* all zeros; NULL where there is no address space */
  void *address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return address == MAP_FAILED ? NULL : address;
}

void clear(void *address, size_t bytes) {
  char *start = address, *end = start + bytes;
  char *first = (char *)(((size_t)start + PAGE - 1) / PAGE * PAGE), *last = (char *)((size_t)end / PAGE * PAGE);
  memset(start, 0, (size_t)(first - start));
  madvise(first, (size_t)(last - first), MADV_DONTNEED); /* private pages come back as zeros */
  memset(last, 0, (size_t)(end - last));
}

int allocate(void **address, size_t bytes, enum kind kind) {
  int error = status() ? status() : forbidden_in_capture();
  size_t rounded = (bytes + PAGE - 1) / PAGE * PAGE;
  *address = NULL;
  if (error || !bytes) return error;
  if (kind == DEVICE && (error = take(rounded))) return error;
  if (!(*address = map(rounded))) return OUT_OF_MEMORY;
  count(kind == DEVICE ? ALLOCATIONS : HOST_ALLOCATIONS);
  if (kind == PINNED) pinned_bytes += rounded;
  insert((struct range){*address, rounded, kind == DEVICE ? rounded : 0, kind, true});
  return OK;
}

int reserve(void **address, size_t bytes) {
  if (!(*address = map(bytes))) return OUT_OF_MEMORY;
  insert((struct range){*address, bytes, 0, DEVICE, true});
  return OK;
}

int pin(void *address, size_t bytes) {
  count(HOST_ALLOCATIONS);
  pinned_bytes += bytes;
  insert((struct range){address, bytes, 0, PINNED, false});
  return status();
}

int release(void *address) {
  if (!address) return status();
  pthread_mutex_lock(&lock);
  size_t after = upper_bound(address);
  if (!after || ranges[after - 1].start != (char *)address) {
    pthread_mutex_unlock(&lock);
    return INVALID_VALUE;
  }
  struct range gone = ranges[after - 1];
  memmove(ranges + after - 1, ranges + after, (range_count - after) * sizeof *ranges);
  range_count--;
  used_bytes -= gone.counted;
  if (gone.kind == PINNED) pinned_bytes -= gone.bytes;
  pthread_mutex_unlock(&lock);
  if (gone.mapped) munmap(gone.start, gone.bytes);
  return status();
}

/* Streams and captures. An ended capture stays in memory, since streams and events may still point to it. */
static _Thread_local int thread_mode; /* what cudaThreadExchangeStreamCaptureMode says */
static _Thread_local struct capture *of_this_thread;
static struct capture *current; /* at most one at a time */

struct capture *capture_of(struct stream *stream) {
  bool its_own = (size_t)stream > 2 && stream->capture && stream->capture->active;
  return its_own ? stream->capture : NULL;
}

int begin_capture(struct stream *stream, int mode) {
  static atomic_ullong ids;
  if ((size_t)stream <= 2 || capture_of(stream)) return CAPTURE_UNSUPPORTED;
  struct capture *capture = calloc(1, sizeof *capture);
  *capture = (struct capture){.origin = stream, .mode = mode, .id = ++ids, .active = true};
  current = of_this_thread = stream->capture = capture;
  return status();
}

int end_capture(struct stream *stream, struct graph **graph) {
  struct capture *capture = capture_of(stream);
  *graph = NULL;
  if (!capture || capture->origin != stream) return CAPTURE_INVALIDATED;
  capture->active = false;
  current = of_this_thread = NULL;
  if (capture->invalid) return CAPTURE_INVALIDATED;
  *graph = malloc(sizeof **graph);
  (*graph)->nodes = capture->nodes;
  return status();
}

int exchange_mode(int mode) {
  int before = thread_mode;
  thread_mode = mode;
  return before;
}

static int invalidate(struct capture *capture) {
  capture->invalid = true;
  return CAPTURE_UNSUPPORTED;
}

int forbidden_in_capture(void) {
  struct capture *capture = of_this_thread;
  if (!capture && current && current->mode == 0 && thread_mode == 0) capture = current;
  return capture && capture->mode != 2 && thread_mode != 2 ? invalidate(capture) : OK;
}

int record_event(struct event *event, struct stream *stream) {
  count(EVENTS);
  event->capture = capture_of(stream);
  return status();
}

int wait_event(struct stream *stream, struct event *event) {
  if (event->capture && event->capture->active && (size_t)stream > 2) stream->capture = event->capture;
  return status();
}

/* What a device does. The launch that fails returns OK: as on a device, a later call finds out. */
int launch(struct stream *stream) {
  int error = status();
  struct capture *capture = capture_of(stream);
  if (error) return error;
  if (capture) capture->nodes++;
  count(capture ? CAPTURED : LAUNCHES);
  return OK;
}

int launch_graph(struct graph *graph, struct stream *stream) {
  if (capture_of(stream)) return NOT_SUPPORTED; /* a child graph */
  count(GRAPH_LAUNCHES);
  return status();
}

static bool transfer(struct stream *stream) { /* whether it happens now */
  struct capture *capture = capture_of(stream);
  if (capture) capture->nodes++;
  else count(COPIES);
  return !capture;
}

static bool untouched(const char *source, size_t bytes) { /* whether no page is in memory, so that it reads as zeros */
  unsigned char in_memory[STRETCH / PAGE + 1];
  char *first = (char *)((size_t)source / PAGE * PAGE);
  if (mincore(first, (size_t)(source + bytes - first), in_memory)) return false;
  for (size_t page = 0; page < (size_t)(source + bytes - first + PAGE - 1) / PAGE; page++)
    if (in_memory[page] & 1) return false;
  return true;
}

static void copy_on_device(char *target, const char *source, size_t bytes) { /* without filling the host's memory */
  for (size_t done = 0; done < bytes; done += STRETCH) {
    size_t part = bytes - done < STRETCH ? bytes - done : STRETCH;
    if (untouched(source + done, part)) clear(target + done, part);
    else memcpy(target + done, source + done, part);
  }
}

int copy(void *target, const void *source, size_t bytes, struct stream *stream) {
  if (status() || !bytes) return status();
  if (!transfer(stream)) return OK;
  enum kind to = kind_of(target, NULL, NULL), from = kind_of(source, NULL, NULL);
  if (to == UNKNOWN || from == UNKNOWN) count(PAGEABLE_COPIES);
  if (to == DEVICE && from == DEVICE && bytes >= LARGE) copy_on_device(target, source, bytes);
  else memmove(target, source, bytes);
  return OK;
}

int fill(void *target, int value, size_t bytes, struct stream *stream) {
  if (status() || !transfer(stream)) return status();
  if (value || bytes < LARGE || kind_of(target, NULL, NULL) != DEVICE) memset(target, value, bytes);
  else clear(target, bytes);
  return OK;
}

int synchronize(struct stream *stream) {
  struct capture *capture = capture_of(stream);
  if (capture) return invalidate(capture);
  count(SYNCS);
  return status();
}

int synchronize_device(void) {
  if (current) return invalidate(current);
  count(SYNCS);
  return status();
}
