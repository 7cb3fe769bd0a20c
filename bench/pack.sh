#!/usr/bin/env bash
# bench/pack.sh CIFAR10.zip: makes in build/pack what a GPU machine without a network is brought: csrc compiled, wheels
# of what that machine lacks, and CIFAR-10's latents (the zip holds train/<class>/*.jpg and test/<class>/*.jpg). What
# lies there already stays. Takes five to ten minutes on two cores. At the end it says how large everything is that
# travels, and fails where that is over 64 MiB.
#
#   PYTHON             the environment that prepares the latents (.venv/bin/python)
#   CUDA_PYTHON        one with that machine's torch, a CUDA build: compiles csrc (without it, that machine does)
#   PACK_WHEELS        what that machine's Python lacks
#   PACK_PYTHON        that machine's Python (3.12)
set -euo pipefail
[ $# -eq 1 ] && [ -n "$1" ] || { echo "usage: bench/pack.sh CIFAR10.zip" >&2; exit 2; }
zip=$(readlink -m "$1")
if [ -n "${CUDA_PYTHON:-}" ]; then
  found=$(command -v "$CUDA_PYTHON") || { echo "CUDA_PYTHON=$CUDA_PYTHON: no such program" >&2; exit 2; }
  CUDA_PYTHON=$(realpath -s "$found")
fi
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
wheels=${PACK_WHEELS:-diffusers importlib_metadata zipp requests charset_normalizer torchao}
pack=build/pack
most=$((64 * 1024 * 1024))
[ -f "$zip" ] || { echo "$zip: no such file; a zip with train/ and test/, a folder a class in each, is needed" >&2; exit 2; }
command -v "$python" >/dev/null || { echo "$python: no such program: make install, or name another by PYTHON" >&2; exit 2; }
mkdir -p $pack/wheels $pack/csrc

if [ ! -f $pack/cifar10-8x8.tar.xz ]; then
  "$python" -m st_fast.prepare "$zip" $pack/cifar10-8x8 --subset train --size 32 --vae small --vae-factor 4
  tar -C $pack -cJf $pack/cifar10-8x8.tar.xz.partial cifar10-8x8
  mv $pack/cifar10-8x8.tar.xz.partial $pack/cifar10-8x8.tar.xz
  rm -r $pack/cifar10-8x8
fi

platforms=()
for glibc in 28 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
for name in $wheels; do
  ls $pack/wheels/"$name"-*.whl >/dev/null 2>&1 || "$python" -m pip download -q --no-deps --only-binary=:all: \
    --python-version "${PACK_PYTHON:-3.12}" --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
    -d $pack/wheels "$name"
done

if [ -n "${CUDA_PYTHON:-}" ]; then
  rm -f $pack/csrc/*.so  # of other sources
  "$CUDA_PYTHON" kernels/build.py
  cp st_fast/_csrc_c*.so $pack/csrc/
else
  echo "CUDA_PYTHON is not set: csrc is compiled on the GPU machine, in half a minute" >&2
fi

{ git ls-files -z --cached --others --exclude-standard; find $pack -type f -print0; } >$pack/files
size=$(xargs -0 stat -c %s <$pack/files | awk '{sum += $1} END {print sum}')
rm $pack/files
echo "travels: $(awk "BEGIN {printf \"%.1f\", $size / 1048576}") MiB of at most 64: the checkout and $pack"
[ "$size" -le $most ] || { echo "over 64 MiB: shorten PACK_WHEELS, or leave files out of $pack" >&2; exit 1; }
