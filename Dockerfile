# The image of both agents. `make image` builds it, and so does Compose.
#
# It uses only plain Dockerfile syntax, so that both BuildKit and the older builder (Debian 12's docker.io) can build it. The base
# images are arguments, so that a mirror or your own images can replace them. Both must be of the same Debian release, because
# the program is linked to its libssl and libc.
ARG BUILDER_IMAGE=rust:1-bookworm
ARG RUNTIME_IMAGE=debian:bookworm-slim

FROM ${BUILDER_IMAGE} AS builder
WORKDIR /build

# If a proxy has its own CA, cargo must trust it: `make image CA_BUNDLE=file.pem` puts the CA here. Only the program is copied from
# this stage to the image. Usually there is no such file, so its name is a pattern, which may match nothing.
COPY Cargo.toml Cargo.lock .cache/build-ca.cr[t] ./

# First compiles only the dependencies, with an empty program. This takes minutes and is cached until Cargo.toml or Cargo.lock
# changes. Tests and benches are not in the build context, so they are removed from the manifest.
RUN awk '/^\[/ { skip = /^\[\[(test|bench|example)\]\]/ } !skip' Cargo.toml > agents.toml && mv agents.toml Cargo.toml \
 && mkdir src && echo 'fn main() {}' > src/main.rs && touch src/lib.rs \
 && { [ ! -f build-ca.crt ] || export CARGO_HTTP_CAINFO=/build/build-ca.crt; } \
 && cargo build --release --locked

# Copied only now, because build.rs depends on the commit, which changes more often than the dependencies.
COPY build.rs ./
COPY src src/
COPY schema schema/
ARG REVISION=
# `touch`, because cargo would keep the empty program if the copied files were older.
RUN touch src/main.rs src/lib.rs \
 && HOST_METRICS_REVISION="$REVISION" cargo build --release --locked --offline


FROM ${RUNTIME_IMAGE}
# A fixed user ID, so that files on a volume or in certs/ can belong to it.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates libssl3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin host-metrics

COPY --from=builder /build/target/release/host-metrics /usr/local/bin/

# For the health check. Set 0.0.0.0:9464 so that Prometheus can reach it too.
ENV METRICS_ADDR=127.0.0.1:9464
USER 10001:10001
ENTRYPOINT ["host-metrics"]
CMD ["--help"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["host-metrics", "health"]

# Last, because they change with every commit, and all steps after them would run again.
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="host-metrics" \
      org.opencontainers.image.description="Checks web sites on schedule and stores every result exactly once" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
