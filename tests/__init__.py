# Compiling is most of what tests do, and most of that is LLVM polishing code that runs once. XLA's own passes stay as they are.
UNOPTIMISED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
