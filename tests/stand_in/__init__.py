"""A CUDA device that does nothing, so that everything around the kernels runs where there is no GPU.

Stand-ins for libcuda, libcudart and cuBLAS (`c/`): kernels and products count themselves and return at once, copies
copy, memory is the host's, never more than the device has, and fresh memory holds zeros. So torch's CUDA build,
Triton's compiler and launcher, Inductor, streams, events, captures and the caching allocator are the real ones. What
can be found out with it: wrong devices, missing pins, waits of the host, launches, host time, peak memory, leaks, what
happens out of memory or after a device error. What can't: numbers, races, time on the device, cuDNN, and rules of
capturing beyond "no wait and no allocation inside of one".

`driver` builds it and says under which variables a process runs on it; `gates` keeps number-comparing checks out of
the way; `rehearse` runs any command on it.
"""
