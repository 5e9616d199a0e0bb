# Stands in for rust:1-bookworm: this machine's own toolchain on a Debian base.
ARG DEBIAN
FROM ${DEBIAN}
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates gcc g++ libc6-dev libssl-dev make pkg-config
COPY toolchain /usr/local/
