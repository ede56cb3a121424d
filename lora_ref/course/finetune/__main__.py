"""python -m lora_ref.course.finetune"""

import sys

from .experiment import main

if __name__ == "__main__":
    sys.exit(main())
