# The build needs the network, running needs none:
#
#   docker build -t cn-stylegan .
#   mkdir -p results
#   docker run --rm --gpus all --network none --user "$(id -u):$(id -g)" \
#       -v /path/to/scans:/scans:ro -v "$PWD/results:/results" \
#       cn-stylegan projector.py /scans --model models/head-128 --out /results
#
# Without a GPU leave out --gpus all. For a machine without network: docker save cn-stylegan | gzip > image.tar.gz on
# another, there docker load < image.tar.gz.
# --read-only needs --tmpfs /tmp:exec beside it: compiled ops and what is being written lie there.
# For training add --ipc=host: the loader's processes hand over slices in shared memory.

# CUDA 13.0 is what the locked torch is built for. Ubuntu 24.04 has Python 3.12, which the lock covers.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# gcc, g++: op/ compiles its C and CUDA sources at first use (nvcc is in the image). tzdata: TZ is UTC without it, and
# it asks where the machine stands unless it is told not to
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive \
       apt-get install -y --no-install-recommends g++ gcc libc6-dev python3 python3-venv tzdata \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY requirements.lock /tmp/requirements.lock
RUN python -m pip install --no-cache-dir --no-deps --only-binary :all: --require-hashes -r /tmp/requirements.lock \
    && rm /tmp/requirements.lock

COPY . /app
WORKDIR /app

# Compiled ops and matplotlib's font list go where any user may write: --user need not be the one made here
ENV XDG_CACHE_HOME=/tmp/cache MPLCONFIGDIR=/tmp/cache/matplotlib PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 10001 reader && install -d -o reader /state
USER reader

ENTRYPOINT ["python"]
CMD ["projector.py", "--help"]
