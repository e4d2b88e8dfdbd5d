"""RoBERTa with DyLoRA, and what the GLUE recipes need around it."""
