"""MEML-GRPO (arXiv 2508.09670): experts of one language model that teach each other in reinforcement learning."""
