import importlib.metadata

# Tests spend most of their time compiling. LLVM would spend most of that on polishing code that runs once, and XLA's
# newer emitters of fused loops four fifths of the rest. XLA's own passes, which shape the program, stay.
UNOPTIMISED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Later XLA has the newer emitters alone, and ends the process at a flag that it does not know.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
  UNOPTIMISED += " --xla_cpu_use_fusion_emitters=false"
