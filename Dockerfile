# A server of bundles, which are mounted: the image holds no weights (.dockerignore leaves out those of the project).
#   docker build -t ddexport .
#   docker run --rm -p 8000:8000 -v "$PWD/build:/bundles:ro" ddexport /bundles/digits-var
FROM python:3.11-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps -w /wheels .

FROM python:3.11-slim
LABEL org.opencontainers.image.title="ddexport" \
      org.opencontainers.image.description="Serves images of distilled auto-regressive models over HTTP" \
      org.opencontainers.image.licenses="Apache-2.0"
# gpu in place of cpu draws on NVIDIA GPUs; hub fetches hf:// bundles, text reads prompts.
ARG EXTRAS=cpu,hub,serve,text
COPY constraints.txt /tmp/
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-compile -c /tmp/constraints.txt "ddexport[$EXTRAS] @ file://$(echo /wheels/ddexport-*.whl)"
RUN useradd --uid 10001 --create-home ddexport
USER 10001
WORKDIR /bundles
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=120s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=3)"]
ENTRYPOINT ["ddexport", "serve", "--host", "0.0.0.0", "--log-json"]
