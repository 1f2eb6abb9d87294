"""The loss's part of `make bench`: the CPU table. The GPU's is `bench_loss_gpu`."""

from tests.benchmarks.loss_cpu import main

if __name__ == "__main__":
    main()
