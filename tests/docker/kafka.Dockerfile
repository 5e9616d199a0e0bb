# Stands in for apache/kafka: the same release, the same variables, folders and user number.
ARG DEBIAN
FROM ${DEBIAN}
RUN apt-get update && apt-get install -y --no-install-recommends openjdk-17-jre-headless \
 && useradd --uid 1000 appuser && mkdir -p /var/lib/kafka/data && chown -R appuser /var/lib/kafka
COPY libs /opt/kafka/libs/
COPY kafka-run /etc/kafka/docker/run
USER appuser
VOLUME ["/var/lib/kafka/data"]
CMD ["/etc/kafka/docker/run"]
