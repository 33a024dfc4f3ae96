.DEFAULT_GOAL := help
PYTHON ?= python3
LAB := $(PYTHON) lab/lab.py

help: ## what can be made
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

run: ## the main job, step by step: on this machine's driver (as root), else in a virtual machine [KERNEL=7.3]
	@if [ -e /dev/ublk-control ] && [ "$$(id -u)" = 0 ]; then sh lab/demo.sh; \
	else echo "Starting a virtual machine ..."; $(LAB) run $(or $(KERNEL),7.3) -- sh lab/demo.sh; fi

learn: ## the steps of learn/README.md: on this machine's driver (as root), else in a virtual machine [STEP=3 only that one, CHECK=2 mine.py an exercise, KERNEL=7.3]
ifdef CHECK
	@$(PYTHON) lab/exercises.py $(CHECK) $(EXERCISE)
else
	@if [ "$(STEP)" = 1 ] || [ -e /dev/ublk-control ] && [ "$$(id -u)" = 0 ]; then $(PYTHON) lab/lessons.py $(STEP); \
	else echo "Starting a virtual machine ..."; $(LAB) run $(or $(KERNEL),7.3) -- python3 lab/lessons.py $(STEP); fi
endif

ifdef CHECK     # a goal beside `learn` is the file to check
EXERCISE := $(filter-out learn,$(MAKECMDGOALS))
$(EXERCISE): learn
	@:
endif

test: ## the test suite, natively and in real kernels [KERNEL=7.3 only that one, K=word as in pytest -k, ALL=1 each path with everything, HOST=1 no virtual machine]
	@$(LAB) test $(if $(KERNEL),--kernel $(KERNEL)) $(if $(K),-k "$(K)") $(if $(ALL),--all) $(if $(HOST),--host)

soak: ## kill servers under load, again and again, in a virtual machine [ROUNDS=100, KERNEL=7.3, MODE="reissue ext4"]
	@$(LAB) run $(or $(KERNEL),7.3) --timeout=86400 -- python3 lab/soak.py --rounds $(or $(ROUNDS),100) $(MODE)

gluster: ## one disk on three copies of GlusterFS, whose servers are killed under load, in a virtual machine [ROUNDS=5]
	@$(LAB) run 7.3 --install=glusterfs-server --install=qemu-block-extra -- \
	python3 lab/stores.py --rounds $(or $(ROUNDS),5) gluster

PROOF := lab/proof.py $(if $(K),-k "$(K)")
proof: ## which bugs of SQLite, PostgreSQL, git, file systems and small programs crash testing finds: README's table, in a virtual machine [K=word only rows with it, SEEDS=1, HOST=1 only record there, and look here: ten times as fast, as root]
	@if [ -z "$(HOST)" ]; then $(LAB) run 7.3 --timeout=86400 -- python3 $(PROOF) --seeds $(or $(SEEDS),1); \
	else logs=$$(mktemp); $(LAB) run 7.3 --timeout=86400 --report=$$logs -- python3 $(PROOF) --record /run/lab-report && \
	$(PYTHON) $(PROOF) --recorded $$logs --seeds $(or $(SEEDS),1); status=$$?; rm $$logs; exit $$status; fi

lab: ## fetch what the tests need: emulator, file system tools, kernels [KERNEL=7.2 only that one]
	@$(LAB) fetch $(KERNEL)

bench: ## compare with the kernel's drivers, nbdkit and FUSE [QUICK=1 one short round, CASES=word only these]
	@$(PYTHON) lab/bench.py $(if $(QUICK),--quick) $(if $(CASES),--cases "$(CASES)")

pictures: ## draw the picture of a disk's life, from its trace in a virtual machine
	@mkdir -p learn/pictures
	@$(LAB) run 7.3 -- sh lab/traced.sh >learn/pictures/trace.tmp
	@$(PYTHON) lab/pictures.py learn/pictures/trace.tmp >learn/pictures/life.svg
	@rm learn/pictures/trace.tmp

profile: ## where the server's time goes, per I/O [TARGET="null --batch" only that]
	@$(PYTHON) lab/profiling.py $(if $(TARGET),"$(TARGET)")

mutants: ## break the program in many small ways, see that the tests notice each [K=word only lines of lab/mutants.txt with it]
	@$(PYTHON) lab/mutants.py $(if $(K),"$(K)")

measure: ## how large and how dense the product's files are, chapter by chapter
	@$(PYTHON) lab/measure.py

lint: ## ruff, mypy, nothing newer than Python 3.9 (vermin), a list of mutants that fits the tree
	@$(LAB) lint

clean: ## remove what Python left in the work tree
	@rm -rf __pycache__ lab/__pycache__ tests/__pycache__ build *.egg-info .pytest_cache .ruff_cache .mypy_cache

.PHONY: help run learn test mutants soak gluster proof lab bench pictures profile measure lint clean
