# The two commands: `make demo` shows the program, `make test` tests it. `make` alone prints the rest.

SHELL_SCRIPTS = .ci/run scripts/* deploy/postgres/*.sh tests/docker/run tests/docker/stand-ins tests/docker/kafka-run tests/docker/postgres-run

.DEFAULT_GOAL := help
.PHONY: help demo test soak test-docker bench-consume bench-views bench-produce soak-produce setup lint deny config image start stop restart status logs reload validate clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

## Try and test

demo: ## the whole pipeline in one process, nothing to set up; ARGS="--for 30s" passes flags on
	@scripts/setup demo
	cargo run --release --locked -- demo $(ARGS)

test: setup lint ## every check and test, against a real Kafka and a real Postgres that it starts itself
	cargo test --locked

soak: setup ## kills of consumers, broker and database for SOAK_SECONDS (600); a printed SOAK_SEED replays a run
	SOAK_SECONDS=$${SOAK_SECONDS:-600} cargo test --locked --test e2e -- --nocapture kills::

test-docker: ## the deployment in containers, every part killed once (needs Docker; STAND_INS=1 where no registry is reached)
	tests/docker/run

bench-consume: setup ## how fast `consume` is beside psql's \copy, and what a record costs; ARGS="9 100" for nine rounds of that batch size alone
	cargo bench --locked --bench wire
	cargo bench --locked --bench consume -- $(ARGS)

bench-views: setup ## what the state costs per record and stores, and how long the views take; ARGS="1000 1440 60" for hosts, checks of each, seconds between them
	cargo bench --locked --bench views -- $(ARGS)

bench-produce: ## what a check costs and how late it is, 100 to 5,000 hosts (Linux, root); ARGS="https 1000" picks cases
	cargo bench --locked --bench produce --no-run
	scripts/alone cargo bench --locked --offline --bench produce -- $(ARGS)

soak-produce: ## 2,000 hosts, some at fault, through reloads, freezes and outages of Kafka: ticks due = records
	cargo bench --locked --bench produce --no-run
	scripts/alone cargo bench --locked --offline --bench produce -- soak $(ARGS)

setup: ## install what `make test` needs and this machine lacks (apt, dnf or brew); does nothing otherwise
	@scripts/setup test

# `scripts/setup test` brings it, where it is not on the PATH.
PROMTOOL = $(or $(shell command -v promtool),.cache/promtool)

lint: ## formatting, clippy, shellcheck and promtool, warnings are errors
	cargo fmt --check
	cargo clippy --all-targets --locked -- -D warnings
	shellcheck $(SHELL_SCRIPTS)
	$(PROMTOOL) check config deploy/prometheus/prometheus.yml
	$(PROMTOOL) test rules deploy/prometheus/rules_test.yml

# Not a part of `make test`: cargo-deny takes minutes to build, and its database of advisories has to be reachable.
deny: ## licences, sources, duplicates and advisories of the dependencies; ARGS="licenses bans sources" where GitHub is out of reach
	@command -v cargo-deny >/dev/null || { echo "there is no cargo-deny here: cargo install cargo-deny --locked" >&2; exit 1; }
	cargo deny --locked check $(ARGS)

## Deploy

config: ## write `env` and `producer_config` from templates/, never over a file that is there
	@scripts/config

# An image from elsewhere (make start HOST_METRICS_IMAGE=registry/name:tag) is used as it is, not built.
start: $(if $(HOST_METRICS_IMAGE),,image) ## build the image, start Kafka, Postgres (unless `env` names your own), both agents
	@scripts/stack start

stop: ## end the agents, everything in hand written, then the rest; the data stays
	@scripts/stack stop

restart: ## stop, then start, for a change in `env`
	@scripts/stack restart

status: ## the containers, how the hosts do, and how far the table is behind
	@scripts/stack status

logs: ## what everybody says, as it comes; Ctrl-C ends the watching
	@scripts/stack logs

reload: ## make `produce` read producer_config again, without a stop
	@scripts/stack reload

validate: ## show how producer_config is understood
	@scripts/stack validate

clean: ## remove containers, image and data; asks before it does
	@scripts/stack clean

image: ## build the container image host-metrics:latest; CA_BUNDLE=FILE where a proxy signs with its own CA
	@scripts/image
