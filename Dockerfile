# docker build --build-arg COMMIT="$(git rev-parse HEAD)" --build-arg LOCK="$(sha256sum <requirements.txt | cut -c-64)" -t distill .
# docker run --rm --read-only --tmpfs /tmp -v distill-data:/data distill                      the main job
# docker run --rm --read-only --tmpfs /tmp -v distill-data:/data distill distill.report runs=/data/runs
#
# CUDA   torch's wheels bring their own, the host its driver (docker run --gpus all). With BASE another image is
#        built upon: --build-arg BASE=nvidia/cuda:<version>-base-ubuntu24.04, or any of Debian or Ubuntu
# CPU    --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu leaves CUDA out
# more   --build-arg EXTRA=s3fs for caches in S3, or peft for adapters; other than the locked requirements, of any version
# pip    --secret id=pip,src="$HOME/.config/pip/pip.conf" for an index of your own; its passwords get into no layer
#
# Python is process 1 and the kernel gives that one no default for a signal. Training and annotation see to SIGTERM
# and SIGUSR1 themselves; for any other command, add --init where it should end on SIGTERM.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS python
# hadolint ignore=DL3008
RUN command -v python3 || { apt-get update && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*; }

FROM python AS build
ARG PIP_EXTRA_INDEX_URL
ARG EXTRA
ARG LOCK=unknown
COPY requirements.txt /app/
# The label is to say what is in the image, so a hash of something else ends here.
RUN test "${LOCK}" = unknown || test "$(sha256sum </app/requirements.txt)" = "${LOCK}  -" \
    || { echo "LOCK=${LOCK} is not the SHA-256 of requirements.txt" >&2; exit 1; }
RUN python3 -m venv /app/venv
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /app/venv/bin/python -m pip install --no-cache-dir --requirement /app/requirements.txt ${EXTRA:+"${EXTRA}"}

FROM python
# User 1000 owns nothing but /data, the home of whatever libraries keep: give it a volume, and the rest can be read-only.
RUN { getent passwd 1000 || useradd --uid 1000 --user-group --no-create-home --home-dir /data distill; } \
    && install --directory --owner=1000 --group=1000 /data
COPY --from=build /app/venv /app/venv
COPY LICENSE requirements.txt /app/
COPY conf /app/conf
COPY distill /app/distill
ENV PATH=/app/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DISTILL_ROOT=/data \
    HOME=/data \
    XDG_CACHE_HOME=/data/.cache \
    HF_HOME=/data/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/data/.cache/torchinductor \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /data
RUN python -c "import importlib, pkgutil, distill; [importlib.import_module(m.name) for m in pkgutil.walk_packages(distill.__path__, 'distill.')]" \
    && python -m distill.train --cfg job >/dev/null && rm -rf /data/.cache
ENTRYPOINT ["python", "-m"]
CMD ["distill.train"]
# Last, as they change with each commit.
ARG COMMIT=unknown
ARG LOCK=unknown
ENV DISTILL_COMMIT=${COMMIT}
LABEL org.opencontainers.image.title="distill" \
      org.opencontainers.image.description="Knowledge distillation for language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}" \
      distill.requirements.sha256="${LOCK}"
