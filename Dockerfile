# docker build --build-arg COMMIT="$(git rev-parse HEAD)" -t distill .
# docker run --rm -v distill-data:/data distill                                     the main job
# docker run --rm -v distill-data:/data distill distill.report runs=/data/runs      any other command
# For an image without CUDA add: --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG PIP_EXTRA_INDEX_URL
RUN python3 -m venv /app/venv
COPY requirements.txt /app/
RUN /app/venv/bin/python -m pip install --no-cache-dir --requirement /app/requirements.txt

FROM ${BASE}
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="distill" \
      org.opencontainers.image.description="Knowledge distillation for language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}"
RUN useradd --uid 1000 --user-group --create-home distill \
    && install --directory --owner=1000 --group=1000 /data
COPY --from=build /app/venv /app/venv
COPY LICENSE /app/
COPY conf /app/conf
COPY distill /app/distill
ENV DISTILL_COMMIT=${COMMIT} \
    PATH=/app/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    DISTILL_ROOT=/data \
    HF_HOME=/data/huggingface
USER 1000:1000
WORKDIR /data
RUN python -c "import importlib, pkgutil, distill; [importlib.import_module(m.name) for m in pkgutil.walk_packages(distill.__path__, 'distill.')]" \
    && python -m distill.train --cfg job
ENTRYPOINT ["python", "-m"]
CMD ["distill.train"]
