"""SPS: a serving runtime for long prompts on several devices."""

__version__ = "0.1.0"
