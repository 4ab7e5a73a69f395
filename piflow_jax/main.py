"""Train a teacher or a student.

  python -m piflow_jax.main --config=configs/digits.py:teacher --workdir=runs/digits/teacher
  python -m piflow_jax.main --config=configs/digits.py:student --workdir=runs/digits/student

Numbers and texts of the config can be set on the command line: --config.batch_size=64. With a config, --help lists them
all. The same command with the same --workdir goes on where it was. On several hosts every one runs the same command
with --distributed=auto (launch/ has scripts that do).

Exit status: 0 done; 2 bad input, or a workdir that cannot be written any more; 3 a loss, or parameters, not finite;
75 start again: stopped by SIGTERM or Ctrl-C with everything saved, or another process is gone. JAX may also abort (134)
with a line of its own: start again whatever a signal ended. A second Ctrl-C ends at once (130).
"""

from piflow_jax import program
from piflow_jax import train_loop


def _main(given):
  return train_loop.train(given.config, given.workdir)


PROGRAM = program.Program(_main, doc=__doc__, config="file")

if __name__ == "__main__":
  program.run(PROGRAM)
