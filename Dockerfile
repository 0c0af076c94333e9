# The environment of `make venv` as an image: the same constraints.txt, so the same versions.
#
#   docker build -t telltale .
#   docker run --rm --gpus all --shm-size 8g -v $PWD/data:/telltale/data -v $PWD/runs:/telltale/runs telltale make quickstart
#   apptainer build telltale.sif docker-daemon://telltale:latest
#
# PyTorch's and DALI's wheels bring their own CUDA; of the host only the driver is needed.
FROM python:3.11-slim-bookworm

# DeepSpeed compiles operators on first use; make is for the README's commands.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git make ninja-build \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /telltale
# The packages first: they change less often than the code.
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE Makefile ./
RUN mkdir dataio models engines launch telltale \
    && touch dataio/__init__.py models/__init__.py engines/__init__.py launch/__init__.py telltale/__init__.py \
    && python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --constraint constraints.txt --editable ".[test]"
COPY . .
RUN .venv/bin/pip install --no-cache-dir --no-deps --editable . && touch .venv/.installed

ENV PATH=/telltale/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1
CMD ["make", "help"]
