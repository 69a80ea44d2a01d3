/* What every line of results says of where it comes from: time, device, driver, versions, commit. Used by bench_grid.c
 * and bench_generate.c. */
#ifndef EXPERIMENTS_BENCH_PROVENANCE_H
#define EXPERIMENTS_BENCH_PROVENANCE_H

/* ,"name":"text" with what JSON asks for in place of quotes; null for NULL. */
void print_text(const char *name, const char *text);

/* "ts":"2026-01-31T12:00:00Z", in UTC */
void print_time(void);

/* ,"device":..,"driver":..,"versions":{..},"commit":".."; device NULL: none was opened. The driver is null on a CPU. */
void print_provenance(const char *device);

#endif
