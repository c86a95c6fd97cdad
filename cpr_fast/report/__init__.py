"""One self-contained HTML page from run folders. Import from `cpr_fast.report.page`."""
