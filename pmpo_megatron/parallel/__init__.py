"""Process groups, and who holds which token. Importing this package prepares Megatron-Core for CPU where there is no GPU.

Import it before anything of ``megatron.core``: its import is what makes the rest of the library usable on CPU.
"""

from pmpo_megatron.parallel import megatron_on_cpu

megatron_on_cpu.install()
