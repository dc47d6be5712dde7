// Compiles a list of rules as the OCI runtimes do, with libseccomp, and writes the filter's instructions to standard output.
//
// Standard input: `default ACTION`, `arch TOKEN`, and `rule ACTION NAME [INDEX OP VALUE VALUE2]...`; numbers in hexadecimal.
// Exit code 3: libseccomp refuses the rules.
#include <errno.h>
#include <seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void refuse(const char *what, const char *line, int error) {
    fprintf(stderr, "%s: %s: %s\n", what, line, strerror(-error));
    exit(3);
}

int main(void) {
    char line[4096], copy[4096];
    scmp_filter_ctx filter = NULL;
    unsigned default_action = 0;
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        strcpy(copy, line);
        char *word = strtok(line, " ");
        if (!word)
            continue;
        if (!strcmp(word, "default")) {
            default_action = strtoul(strtok(NULL, " "), NULL, 16);
            filter = seccomp_init(default_action);
            if (!filter)
                refuse("init", copy, -EINVAL);
        } else if (!strcmp(word, "arch")) {
            int error = seccomp_arch_add(filter, strtoul(strtok(NULL, " "), NULL, 16));
            if (error && error != -EEXIST)
                refuse("arch", copy, error);
        } else if (!strcmp(word, "rule")) {
            unsigned action = strtoul(strtok(NULL, " "), NULL, 16);
            char *name = strtok(NULL, " ");
            int number = seccomp_syscall_resolve_name(name), count = 0;
            struct scmp_arg_cmp conditions[6];
            // As runc: a call that libseccomp does not know, and a rule that says what the default says, are left out.
            if (number == __NR_SCMP_ERROR || action == default_action)
                continue;
            while ((word = strtok(NULL, " "))) {
                struct scmp_arg_cmp *c = &conditions[count++];
                c->arg = strtoul(word, NULL, 16);
                c->op = strtoul(strtok(NULL, " "), NULL, 16);
                c->datum_a = strtoull(strtok(NULL, " "), NULL, 16);
                c->datum_b = strtoull(strtok(NULL, " "), NULL, 16);
            }
            int error = seccomp_rule_add_array(filter, action, number, count, conditions);
            if (error)
                refuse("rule", copy, error);
        } else {
            return 2;
        }
    }
    fflush(stdout);
    int error = seccomp_export_bpf(filter, STDOUT_FILENO);
    if (error)
        refuse("export", "", error);
    return 0;
}
