"""References that stages exchange, and functions to open the artifacts behind them."""
