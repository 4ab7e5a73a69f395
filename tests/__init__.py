# Tests spend most of their time compiling, and LLVM most of that polishing code that runs once. XLA's own passes stay.
UNOPTIMISED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
