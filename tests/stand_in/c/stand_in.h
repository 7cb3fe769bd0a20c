/* What the stand-ins for libcuda, libcudart and cuBLAS share: error codes, counters, memory, streams and captures.
 *
 * Streams, events, graphs and their captures are those of both APIs; a handle is a pointer to the struct below.
 * All functions return an error code, which has the same number in the driver's and in the runtime's API. */
#ifndef STAND_IN_H
#define STAND_IN_H

#include <stdbool.h>
#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))

enum error {
  OK = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NO_DEVICE = 100,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  ILLEGAL_ADDRESS = 700,
  NOT_SUPPORTED = 801,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
};

/* The names are in state.c, in this order. */
enum counter {
  LAUNCHES,         /* kernels and cuBLAS calls, those of a capture not included */
  CAPTURED,         /* the same, recorded by a capture */
  GRAPH_LAUNCHES,
  COPIES,           /* copies and fills of memory outside of a capture */
  PAGEABLE_COPIES,  /* of these, those from or to host memory that is not pinned */
  SYNCS,            /* waits of the host for the device */
  ALLOCATIONS,      /* of device memory, by the device */
  HOST_ALLOCATIONS, /* of pinned memory */
  EVENTS,           /* recorded */
  COUNTERS
};
void count(enum counter which);

/* The error that every call returns once the device has failed (ST_FAST_STAND_IN_FAIL_AFTER), else OK. */
int status(void);
const char *error_name(int code);
const char *error_text(int code);

/* Device memory: address space of the host whose pages take room only when they are written to. */
enum kind { UNKNOWN, DEVICE, PINNED };
int allocate(void **address, size_t bytes, enum kind kind);
int pin(void *address, size_t bytes); /* memory of the host that exists */
int release(void *address);
enum kind kind_of(const void *address, void **start, size_t *bytes); /* the last two may be NULL */
int take(size_t bytes); /* counts bytes as used; OUT_OF_MEMORY beyond the device's size */
void give_back(size_t bytes);
int reserve(void **address, size_t bytes); /* address space only; `release` frees it */
void clear(void *address, size_t bytes);   /* zeros, with the pages given back to the host; of DEVICE memory */
void memory_info(size_t *free_bytes, size_t *total);

/* Streams and captures. Streams 0, 1 and 2 are CUDA's default ones, which capture nothing. */
struct capture {
  struct stream *origin;
  int mode; /* cudaStreamCaptureMode: 0 global, 1 of this thread, 2 relaxed */
  unsigned long long id;
  size_t nodes;
  bool active, invalid;
};
struct stream {
  int priority;
  struct capture *capture; /* the last one; it may be over */
};
struct event {
  struct capture *capture;
};
struct graph {
  size_t nodes;
};
struct capture *capture_of(struct stream *stream); /* the one that is going on, else NULL */
int begin_capture(struct stream *stream, int mode);
int end_capture(struct stream *stream, struct graph **graph);
int exchange_mode(int mode);
int forbidden_in_capture(void); /* CAPTURE_UNSUPPORTED where this thread's captures forbid such a call, else OK */
int record_event(struct event *event, struct stream *stream);
int wait_event(struct stream *stream, struct event *event);

/* What a device does. */
int launch(struct stream *stream);
int launch_graph(struct graph *graph, struct stream *stream);
int copy(void *target, const void *source, size_t bytes, struct stream *stream);
int fill(void *target, int value, size_t bytes, struct stream *stream);
int synchronize(struct stream *stream);
int synchronize_device(void);
float event_milliseconds(void);

/* The device that is described: an H100. */
int device_count(void);
int device_attribute(int attribute);
void *driver_entry_point(const char *name);
extern const char DEVICE_NAME[];

/* For entry points that a torch needs and the stand-in lacks; `rest.c` is a list of these, made for each torch. */
int unsupported(const char *name);
#define UNSUPPORTED(name) \
  EXPORT int name(void) { return unsupported(#name); }
#define ACCEPTED(name) \
  EXPORT int name(void) { return status(); }
#define BLAS_LAUNCH(name) \
  EXPORT int name(void) { return blas_launch(); }
int blas_launch(void); /* on the stream that cublasSetStream named last in this thread */

#endif
