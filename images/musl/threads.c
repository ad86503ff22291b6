/* Threads, locks, floating point and the locale-free parts of libc: prints values that any correct
 * processor prints alike. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned long total;

static void *work(void *arg)
{
	unsigned long x = (unsigned long)arg + 1;
	for (int i = 0; i < 20000; i++) {
		x = x * 6364136223846793005ul + 1442695040888963407ul;
		if (i % 100 == 0) {
			pthread_mutex_lock(&lock);
			total += x >> 33;
			pthread_mutex_unlock(&lock);
		}
	}
	return (void *)x;
}

int main(void)
{
	pthread_t threads[4];
	for (long i = 0; i < 4; i++)
		if (pthread_create(&threads[i], NULL, work, (void *)i)) return 1;
	for (int i = 0; i < 4; i++) {
		void *x;
		pthread_join(threads[i], &x);
		printf("thread %d %lx\n", i, (unsigned long)x);
	}
	printf("total %lu\n", total);
	long double e = 1, term = 1;
	for (int i = 1; i < 30; i++) e += term /= i;
	printf("e %.18Lf sqrt2 %.17g sin1 %a\n", e, sqrt(2), sin(1));
	char text[64];
	snprintf(text, sizeof text, "%s-%05d-%e", "musl", 42, 6.02214076e23);
	puts(text);
	return strlen(text) == 24 ? 0 : 3;
}
