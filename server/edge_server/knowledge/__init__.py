"""What is known of texts before anybody learns from them: filters of synthetic text, judgments and who can be trusted; pure."""
