# `make demo` shows the program and `make check` tests a change. `make` alone prints all targets.

SHELL_SCRIPTS = .ci/run scripts/* deploy/postgres/*.sh tests/docker/run tests/docker/stand-ins tests/docker/kafka-run tests/docker/postgres-run

.DEFAULT_GOAL := help
.PHONY: help demo check unit e2e test pictures soak test-docker fuzz mutants coverage bench-consume bench-views bench-page bench-produce soak-produce setup lint deny install config image start stop restart status logs reload validate clean

# $(call require,PROGRAM,COMMAND): stops with the command that installs the program, if it is missing.
require = command -v $(1) >/dev/null || { echo "$(1) is not installed; to install it: $(2)" >&2; exit 1; }

help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

## Run and test

# The profile `demo` compiles in a fraction of the time of `release`. The flags do the same for librdkafka, which is written in C, and
# zstd is a C library that the demo does not need.
demo: ## run the whole pipeline in one process, without any setup; ARGS="--for 30s" passes flags
	@scripts/setup demo
	@[ -x "$${CARGO_TARGET_DIR:-target}/demo/host-metrics" ] || { \
		echo "Compiling host-metrics and about 200 libraries: about 3 minutes on two cores, the first time only."; \
		echo "The largest is librdkafka (C); host-metrics itself comes last. Then the demo starts."; }
	CFLAGS="-O0 -g0" CXXFLAGS="-O0 -g0" cargo run --profile demo --no-default-features --locked -- demo $(ARGS)

check: ## format, clippy, and all tests that need no server; about a minute once compiled, because the simulators try fewer histories than in `make test`
	@scripts/setup demo
	cargo fmt --check
	cargo clippy --all-targets --locked -- -D warnings
	RUST_TEST_THREADS=24 SIMULATOR_SEEDS=200 FLEET_SEEDS=200 cargo test --locked --lib --test it

unit: ## the unit tests; ARGS=schedule runs those with that name
	cargo test --locked --lib -- $(ARGS)

e2e: setup ## the tests with a real Kafka and a real Postgres, which they start; ARGS=poison:: runs some of them
	cargo test --locked --test e2e -- $(ARGS)

# The tests that need no server mostly wait, so more of them run at once.
test: setup lint ## all checks and tests
	RUST_TEST_THREADS=4 cargo test --locked --lib --bins --test it
	cargo test --locked --test e2e

pictures: setup ## make the pictures of the README, and others in target/pictures, from a pipeline that really ran
	PICTURES="$$PWD/target/pictures" cargo test --locked --test e2e -- page::a_browser docs::a_check
	mkdir -p docs/pictures && cd target/pictures && cp overview-800-light.png overview-800-dark.png host-800-light.png check-760-dark.png ../../docs/pictures

soak: setup ## kill and freeze producers, consumers, broker and database at random for SOAK_SECONDS=600, then audit; SOAK_SEED=N repeats a run
	SOAK_SECONDS=$${SOAK_SECONDS:-600} cargo test --locked --test e2e -- --nocapture kills::

test-docker: ## test the deployment in containers and kill each part once (needs Docker); STAND_INS=1 builds images without a registry
	tests/docker/run

TARGET ?= host_file
SECONDS ?= 60
fuzz: ## fuzz one target of fuzz/fuzz_targets; TARGET=record SECONDS=1800 selects the target and the time
	@$(call require,cargo-fuzz,cargo install cargo-fuzz --locked)
	@cargo +nightly --version >/dev/null 2>&1 || { echo "Rust nightly is not installed; to install it: rustup toolchain install nightly" >&2; exit 1; }
	cargo +nightly fuzz run --sanitizer none $(TARGET) -- -max_total_time=$(SECONDS)

MUTATED = src/consume/ingest/*.rs src/consume/batch.rs src/produce/schedule/*.rs src/produce/share/*.rs src/produce/outbox.rs src/tables/row.rs src/sample/*.rs
mutants: ## change the code of the pure parts in small ways and list changes that no test notices; takes hours
	@$(call require,cargo-mutants,cargo install cargo-mutants --locked)
	cargo mutants $(foreach file,$(MUTATED),--file '$(file)') $(ARGS) -- --locked --lib --test it

coverage: ## the share of the code that the unit and integration tests run; ARGS=--html writes a report
	@$(call require,cargo-llvm-cov,cargo install cargo-llvm-cov --locked)
	cargo llvm-cov --locked --lib --test it $(ARGS)

bench-consume: setup ## compare the speed of `consume` with psql's \copy; ARGS="9 100 slow-disk" runs nine rounds with batches of 100 only, with a millisecond added to each flush of the disk
	cargo bench --locked --bench wire
	cargo bench --locked --bench consume -- $(ARGS)

bench-views: setup ## measure the cost of the state per record, its size and the views; ARGS="1000 1440 60" sets hosts, checks per host and seconds between them
	cargo bench --locked --bench views -- $(ARGS)

bench-page: ## measure the status page: requests per second of a core, idle connections, rendering 1,000 hosts (Linux)
	cargo bench --locked --bench page

bench-produce: ## measure the cost and lateness of checks with 100 to 5,000 hosts (Linux, root); ARGS="https 1000" selects cases; ARGS=group compares with PRODUCE_GROUP, ARGS=takeover counts missed ticks (after `make setup`), ARGS=million takes six minutes
	cargo bench --locked --bench produce --no-run
	scripts/alone cargo bench --locked --offline --bench produce -- $(ARGS)

soak-produce: ## check 2,000 hosts through reloads, freezes and Kafka outages, and compare ticks with records (Linux, root)
	cargo bench --locked --bench produce --no-run
	scripts/alone cargo bench --locked --offline --bench produce -- soak $(ARGS)

setup: ## install the programs that `make test` needs, if any are missing (apt, dnf or brew)
	@scripts/setup test

# If it is not on the PATH, `scripts/setup test` installs it here.
PROMTOOL = $(or $(shell command -v promtool),.cache/promtool)

lint: ## format, clippy, shellcheck and promtool; warnings are errors
	cargo fmt --check
	cargo clippy --all-targets --locked -- -D warnings
	shellcheck $(SHELL_SCRIPTS)
	$(PROMTOOL) check config deploy/prometheus/prometheus.yml
	$(PROMTOOL) test rules deploy/prometheus/rules_test.yml

# Not part of `make test`, because cargo-deny takes minutes to compile and needs its database of advisories from GitHub.
deny: ## check the dependencies: licences, sources, duplicates, advisories; ARGS="licenses bans sources" works without GitHub
	@$(call require,cargo-deny,cargo install cargo-deny --locked)
	cargo deny --locked check $(ARGS)

PREFIX ?= /usr/local
install: ## install the program, its manual pages and shell completions under PREFIX=/usr/local
	cargo build --release --locked
	scripts/install "$(DESTDIR)$(PREFIX)" "$${CARGO_TARGET_DIR:-target}/release/host-metrics"

## Deploy

config: ## create `env` and `producer_config` from templates/; existing files stay
	@scripts/config

# With HOST_METRICS_IMAGE=registry/name:tag, that image is used and none is built.
start: $(if $(HOST_METRICS_IMAGE),,image) ## build the image and start both agents and the status page, with Kafka and Postgres unless `env` names your own
	@scripts/stack start

stop: ## stop the agents after their last flush, then the servers; the data stays
	@scripts/stack stop

restart: ## stop and start, to apply a change in `env`
	@scripts/stack restart

status: ## show the containers, the state of the hosts and the lag behind Kafka
	@scripts/stack status

logs: ## follow the logs; Ctrl-C stops following
	@scripts/stack logs

reload: ## make the running `produce` read producer_config again
	@scripts/stack reload

validate: ## check producer_config and show its hosts
	@scripts/stack validate

clean: ## remove containers, image and data, after a question
	@scripts/stack clean

image: ## build the container image host-metrics:latest; CA_BUNDLE=FILE adds the CA of a proxy
	@scripts/image
