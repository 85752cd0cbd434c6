# The same on every machine: finds a Vulkan adapter (or unpacks a software one under target/), then calls cargo.
# On Windows and macOS, or with a driver installed, plain `cargo run --release -- train` does the same.
CARGO ?= cargo
VULKAN := bash scripts/vulkan.sh

.PHONY: train test setup lint run clean-vulkan

train: ## the main job on the embedded models and data; ARGS="my.toml --set train.steps=50"
	@$(VULKAN) $(CARGO) run --release -- train $(ARGS)

run: ## any other verb: make run ARGS="devices"
	@$(VULKAN) $(CARGO) run --release -- $(ARGS)

test: ## every test; ARGS="--test ops matmul" narrows it
	@$(VULKAN) $(CARGO) test --release $(ARGS)

setup: ## only says (and where needed unpacks) which Vulkan driver the other targets use
	@$(VULKAN)

lint: ## formatting, clippy and documentation, warnings denied
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --no-deps

clean-vulkan: ## forgets the unpacked software driver
	rm -rf target/lavapipe
