# Tests spend most of their time compiling. LLVM would spend most of that on polishing code that runs once, and XLA's
# newer emitters of fused loops four fifths of the rest. XLA's own passes, which shape the program, stay.
UNOPTIMISED = " ".join((
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false"))
