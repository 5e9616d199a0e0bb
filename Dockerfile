# The image of both agents. `make image` builds it, and so does Compose.
#
# It needs nothing beyond a plain Dockerfile, so that BuildKit and the older builder (Debian 12's docker.io) both build it.
# Each base is an argument: a mirror, or an image of your own, takes its place without an edit here. The two must be of one
# Debian release, because the program is linked to its libssl and libc.
ARG BUILDER_IMAGE=rust:1-bookworm
ARG RUNTIME_IMAGE=debian:bookworm-slim

FROM ${BUILDER_IMAGE} AS builder
WORKDIR /build

# Behind a proxy that signs with a CA of its own, cargo has to trust that CA: `make image CA_BUNDLE=file.pem` puts it here.
# Nothing of this stage but the program reaches the image. (Usually there is no such file, hence the pattern.)
COPY Cargo.toml Cargo.lock .cache/build-ca.cr[t] ./

# First the dependencies alone, with an empty program: minutes, cached until Cargo.toml or Cargo.lock changes. Tests and
# benches are not in the build context, so the manifest must not name them.
RUN awk '/^\[/ { skip = /^\[\[(test|bench|example)\]\]/ } !skip' Cargo.toml > agents.toml && mv agents.toml Cargo.toml \
 && mkdir src && echo 'fn main() {}' > src/main.rs && touch src/lib.rs \
 && { [ ! -f build-ca.crt ] || export CARGO_HTTP_CAINFO=/build/build-ca.crt; } \
 && cargo build --release --locked

# Not before: it tells the program its commit, and that changes more often than the dependencies.
COPY build.rs ./
COPY src src/
COPY schema schema/
ARG REVISION=
# `touch`: what was copied may be older than the empty program, and cargo would keep that one.
RUN touch src/main.rs src/lib.rs \
 && HOST_METRICS_REVISION="$REVISION" cargo build --release --locked --offline


FROM ${RUNTIME_IMAGE}
# A fixed number, so that files on a volume or in certs/ can be given to it.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates libssl3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin host-metrics

COPY --from=builder /build/target/release/host-metrics /usr/local/bin/

# Where the agent tells how it is, and the health check asks it. For Prometheus to reach it too: 0.0.0.0:9464.
ENV METRICS_ADDR=127.0.0.1:9464
USER 10001:10001
ENTRYPOINT ["host-metrics"]
CMD ["--help"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["host-metrics", "health"]

# Last, because they change with every commit and would rebuild what comes after them.
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="host-metrics" \
      org.opencontainers.image.description="Checks web sites on time and stores every result exactly once" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
