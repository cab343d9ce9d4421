#!/usr/bin/env bash
# Assembles a LibTorch 2.9.0 for cargo from PyPI's wheels, and prints its folder:
#
#   export LIBTORCH=$(model/libtorch.sh DIR)           CPU: 1 GB to download, 600 MB on disk
#   export LIBTORCH=$(model/libtorch.sh DIR --cuda)    CUDA 12.8: 3 GB to download, 6 GB on disk
#
# Ranks as processes on CPUs need Gloo's headers. They come from Debian's libgloo-dev, if apt-get has it.
set -euo pipefail
dir=${1:?usage: model/libtorch.sh DIR [--cuda]}
cuda=${2:-}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
if [ -f "$dir/build-version" ]; then
    echo "$dir"
    exit
fi
wheels=$(mktemp -d "$dir/wheels.XXXX")
trap 'rm -rf "$wheels"' EXIT
fetch() {
    python3 -m pip download --quiet --dest "$wheels" --only-binary=:all: --python-version 3.11 \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 \
        --platform manylinux2010_x86_64 "$@" >&2
}
# The CPU build uses no CUDA symbols, but libtorch_cpu.so links to these two libraries.
case $cuda in
'') fetch --no-deps torch==2.9.0 nvidia-cuda-runtime-cu12==12.8.90 nvidia-cuda-cupti-cu12==12.8.90 ;;
# The headers of CUDA's runtime include those of its compiler and its C++ library.
--cuda)
    fetch torch==2.9.0
    fetch --no-deps nvidia-cuda-nvcc-cu12==12.8.93 nvidia-cuda-cccl-cu12==12.8.90
    ;;
*) echo "unknown option $cuda" >&2; exit 2 ;;
esac
mkdir -p "$dir/lib"
python3 - "$dir" "$wheels" "$cuda" <<'PY'
import pathlib, sys, zipfile
out, wheels, cuda = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
cpu_only = {"libtorch_cpu.so", "libc10.so", "libgomp.so.1"}
for wheel in sorted(wheels.glob("*.whl")):
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if name.endswith("/"):
                continue
            if name.startswith("torch/include/"):
                to = out / name.removeprefix("torch/")
            elif cuda and name.startswith("nvidia/") and "/include/" in name:
                # Headers of CUDA and NCCL.
                to = out / "include" / name.split("/include/", 1)[1]
            elif "/lib/" in name and ".so" in name.rsplit("/", 1)[1]:
                file = name.rsplit("/", 1)[1]
                if not cuda and name.startswith("torch/") and file not in cpu_only:
                    continue
                to = out / "lib" / file
            else:
                continue
            to.parent.mkdir(parents=True, exist_ok=True)
            with files.open(name) as read, open(to, "wb") as write:
                while block := read.read(1 << 24):
                    write.write(block)
    wheel.unlink()
PY
if [ -z "$cuda" ]; then
    # A stub, because the real libtorch.so links to libtorch_cuda.so.
    echo | gcc -shared -fPIC -x c - -o "$dir/lib/libtorch.so" -Wl,-soname,libtorch.so
fi
if ! (cd "$wheels" && apt-get download -qq libgloo-dev >&2 && dpkg -x libgloo-dev*.deb "$dir/gloo"); then
    echo "no libgloo-dev: ranks can't be processes on CPUs" >&2
fi
echo "2.9.0" > "$dir/build-version"
echo "$dir"
