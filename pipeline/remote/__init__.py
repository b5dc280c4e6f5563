"""Train from datasets behind URLs: fetch shards ahead of the plan's need into a bounded cache folder."""
