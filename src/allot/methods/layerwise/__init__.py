"""What looks at one layer or block of the model at a time, streamed or not."""
